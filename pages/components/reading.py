"""The prompt as text beside the patterns of its heads, linked: hover a token to see what it reads and who reads it."""

from collections.abc import Callable
from typing import Any

import streamlit as st

from analysis.prompt.patterns import Drawn
from pages.components import component
from pages.components.picture import as_text, encoded

_reading = component(__file__, "picture")


def reading(
    tokens: list[str],
    patterns: Drawn,
    what: str,
    head: int | None,
    span: tuple[int, int] | None,
    key: str,
    picked: Callable[[int, int], None],
    picked_head: Callable[[int | None], None],
) -> None:
    """The tokens, a small pattern of every head, and a large one of the chosen head, or of the mean over all.

    Args:
        tokens: as they are shown, BOS first.
        patterns: what every destination takes from every source.
        what: a number of them, in words.
        head: the chosen one.
        span: first and last chosen position.
        key: of the component in the session.
        picked: is called with the first and last position of what was clicked.
        picked_head: is called with the head that was clicked, or None where it was the chosen one.
    """

    def on_token() -> None:
        first, last = st.session_state[key]["token"]
        if 1 <= first <= last < len(tokens):
            picked(first, last)

    def on_head() -> None:
        clicked = st.session_state[key]["head"]
        if 0 <= clicked < len(patterns.small):
            picked_head(None if clicked == head else clicked)

    data: dict[str, Any] = {
        "tokens": tokens,
        "what": what,
        "head": head,
        "span": list(span) if span else None,
        "largest": patterns.largest,
        "matrix": as_text(patterns.matrix),
        "large": encoded(patterns.large),
        "small": [*map(encoded, patterns.small)],
    }
    _reading(key=key, data=data, on_token_change=on_token, on_head_change=on_head)
