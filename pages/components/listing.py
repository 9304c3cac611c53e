"""Rows of features, of which one is chosen: by a click, by the arrow keys, or by j and k from anywhere on the page."""

import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from pages.components import component
from pages.shared.columns import configured

_listing = component(__file__)


def listing(
    frame: pd.DataFrame,
    ids: str,
    chosen: int | None,
    picked: Callable[[int], None],
    key: str,
    *,
    group: str | None = None,
    tokens: Sequence[str] = (),
    search: str | None = None,
    to_top: bool = False,
    height: int = 360,
    **settings: Any,
) -> None:
    """A table that fits its place, sorted by a click on a header; the row of the chosen id is marked.

    Args:
        frame: one column a field, drawn as COLUMNS has it; a column of arrays [token] is drawn as a strip.
        ids: the column of what is picked, unique.
        picked: is called with the id of a row.
        key: of the component in the session.
        group: a column by which rows stand together, where it has several values; of a group a few are shown at first.
        tokens: of a strip.
        search: label of the field that the slash key goes to; with it j and k step through the rows.
        to_top: a pick scrolls the page to its top.
        height: in pixels, at most.
        settings: of columns by name, as `configured` takes them.
    """

    def on_picked() -> None:
        if (wanted := st.session_state[key]["picked"]) in known:
            picked(wanted)

    known = frame[ids].tolist()
    columns = configured(frame, settings)
    drawn = {name: of for name in frame if (of := columns.get(name, {})) is not None}
    data = {
        "name": "Features",
        "columns": [_described(frame[name], of) for name, of in drawn.items()],
        "rows": [list(row) for row in zip(*(_values(frame[name]) for name in drawn), strict=True)],
        "ids": known,
        "chosen": chosen,
        "group": None if group is None else list(drawn).index(group),
        "tokens": list(tokens),
        "search": search,
        "to_top": to_top,
        "height": height,
    }
    _listing(key=key, data=data, on_picked_change=on_picked)


def _described(values: pd.Series, of: dict[str, Any]) -> dict[str, Any]:
    kind, digits = "text", 0
    if _is_strip(values):
        kind = "strip"
    elif pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        form = (of.get("type_config") or {}).get("format")
        kind = {"percent": "percent", "localized": "count"}.get(form, "number")
        if kind == "number" and form:
            digits = int(form.partition(".")[2][:1] or 0)
    label, width = of.get("label") or str(values.name), of.get("width")
    width = width if isinstance(width, int) else None  # one that is not in pixels takes what is left
    return {"name": values.name, "label": label, "help": of.get("help"), "width": width, "kind": kind, "digits": digits}


def _values(values: pd.Series) -> list[Any]:
    if _is_strip(values):
        return [_bytes(row) for row in values]
    return [None if pd.isna(value) else value for value in values.tolist()]


def _is_strip(values: pd.Series) -> bool:
    return len(values) > 0 and isinstance(values.iloc[0], np.ndarray)


def _bytes(row: np.ndarray) -> str:
    """Of a strip: 255 where it is highest."""
    scaled = np.ceil(np.clip(row, 0, None) * (255 / max(float(row.max(initial=0)), 1e-12)))
    return base64.b64encode(scaled.clip(0, 255).astype(np.uint8).tobytes()).decode()
