"""Components: a plain ES module and its styles beside the Python that feeds them."""

from pathlib import Path
from typing import Any

import streamlit as st


def component(python: str, *shared: str) -> Any:
    """The component of the `.js` and `.css` beside a Python file, drawn in a div of the file's name.

    Args:
        shared: names of files whose code and styles go before its own: Streamlit's modules cannot import each other.
    """
    file = Path(python)
    files = [*(file.with_name(name) for name in shared), file]
    css, js = ("\n".join(each.with_suffix(kind).read_text() for each in files) for kind in (".css", ".js"))
    return st.components.v2.component(file.stem, html=f"<div class='{file.stem}'></div>", css=css, js=js)
