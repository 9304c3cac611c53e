"""Components: a plain ES module and its styles beside the Python that feeds them."""

from pathlib import Path
from typing import Any

import streamlit as st


def component(python: str) -> Any:
    """The component of the `.js` and `.css` beside a Python file, drawn in a div of the file's name."""
    file = Path(python)
    return st.components.v2.component(
        file.stem,
        html=f"<div class='{file.stem}'></div>",
        css=file.with_suffix(".css").read_text(),
        js=file.with_suffix(".js").read_text(),
    )
