"""A table as files."""

from collections.abc import Callable
from functools import partial

import pandas as pd
import streamlit as st

from analysis.spreadsheet import guarded


def downloads(table: pd.DataFrame, label: str, name: str) -> None:
    """Buttons that give a table as CSV and as JSON: `label` with the kind, a file of a name without its ending."""
    kinds: dict[str, Callable[[], str]] = {  # written where somebody asks: of all features that takes as long as a page
        "csv": lambda: guarded(table).to_csv(index=False),
        "json": partial(table.to_json, orient="records", indent=1),
    }
    for column, (kind, written) in zip(st.columns(2), kinds.items(), strict=True):
        column.download_button(f"{label} as {kind.upper()}", written, f"{name}.{kind}", disabled=table.empty)
