"""The frame of a page: its top, its folder, and errors as sentences.

Everything a widget chooses is in the URL (`bind="query-params"`), so an address is a permalink.
"""

import html
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.runtime.pages_manager import PagesManager

from pages.components.link import copy_link
from trainer.checkpoint import Checkpoint, CheckpointError

ROOT = Path(__file__).parents[2]
LINKED = "of"  # the checkpoint of a link: Streamlit drops from it what the page that one leaves calls so too
HALVES = "halves"  # key of what holds two columns that stand below each other on a narrow screen
ARROW = ":material/arrow_forward:"


def begin(title: str, what: str) -> None:
    """The top of a page: its title and one sentence on what it shows."""
    _through_app_py()
    st.html(Path(__file__).with_suffix(".html"), unsafe_allow_javascript=True)
    with st.container(horizontal=True, vertical_alignment="center", key="top"):
        st.title(title, anchor=False, width="content")
        st.caption(what)
        with st.container(width="content"):
            copy_link()


def _through_app_py() -> None:
    """Run app.py first, where Streamlit ran a page by itself.

    A fresh server that finds a folder called `pages/` runs the script of the address without app.py, until
    `st.navigation` has been called once: https://github.com/streamlit/streamlit/blob/develop/lib/streamlit/runtime/pages_manager.py
    """
    if PagesManager.uses_pages_directory:
        PagesManager.uses_pages_directory = False
        st.rerun()


def folder() -> Path:
    """The checkpoint folder: `checkpoints/` beside app.py, or ATTN_SAES_CHECKPOINTS."""
    return Path(os.environ.get("ATTN_SAES_CHECKPOINTS") or ROOT / "checkpoints")


def typed(text: str | Path) -> str:
    """A path, or a text with paths in it, as one types them beside app.py."""
    return str(text).replace(f"{ROOT}{os.sep}", "")


def plain(text: str | Path) -> str:
    """A text from an address, a file, a folder's name or an error, for Markdown: a span of code, shown as it is.

    Escapes would not do: Streamlit replaces emoji, icons and bare addresses after Markdown has taken them away.
    """
    line = " ".join(str(text).split()) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    edge = " " if "`" in (line[0], line[-1]) else ""
    return f"{fence}{edge}{line}{edge}{fence}"


def small(text: str) -> None:
    """A text from a file in small letters, as it is."""
    st.html(f'<div style="font-size:.8rem;line-height:1.35;opacity:.8">{html.escape(text)}</div>')


def refuse(why: object) -> None:
    """Why something cannot be done: what it says of files and names is text, not Markdown."""
    st.error(plain(typed(str(why))))


@contextmanager
def sentences(kinds: tuple[type[Exception], ...] = (CheckpointError,)) -> Iterator[None]:
    """What cannot be shown ends the page with its sentence, not with a traceback.

    Args:
        kinds: of errors; default those of a checkpoint, as where a file turns out to be damaged.
    """
    try:
        yield
    except kinds as error:
        refuse(error)
        st.stop()


def hint(error: CheckpointError, then: str) -> None:
    """Why there is nothing to show, and the command that mends it, announced by `then`."""
    if error.command is None:
        st.text(f"{typed(error.reason)}.")
    else:
        st.text(f"{typed(error.reason)}. {then}:")
        st.code(typed(error.command), language="bash")


def feature_link(checkpoint: Checkpoint, feature: int, label: str, column: Any = st, **more: Any) -> None:
    """A link to the dashboard of a feature; `more` of `st.page_link`."""
    query = {LINKED: checkpoint.name, "feature": str(feature)}
    column.page_link("pages/features.py", label=label, query_params=query, **{"icon": ARROW, **more})
