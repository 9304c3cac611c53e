"""The prompt as text beside the patterns of its heads, linked: hover a token to see what it reads and who reads it."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

_THUMBNAIL, _LARGE = 64, 224  # pixels of a pattern, of which each shows one number
_here = Path(__file__)
_reading = st.components.v2.component(
    "reading",
    html="<div class='reading'></div>",
    css=_here.with_suffix(".css").read_text(),
    js=_here.with_suffix(".js").read_text(),
)


def reading(
    tokens: list[str],
    matrices: Float[Tensor, "head query source"],
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
        matrices: what every destination takes from every source.
        what: a number of the matrices, in words.
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
        if 0 <= clicked < len(matrices):
            picked_head(None if clicked == head else clicked)

    shown = matrices.mean(0) if head is None else matrices[head]
    largest = max(matrices.abs().max().item(), 1e-12)
    data: dict[str, Any] = {
        "tokens": tokens,
        "what": what,
        "head": head,
        "span": list(span) if span else None,
        "largest": shown.abs().max().item(),
        "matrix": _bytes(shown, shown.abs().max().item()),
        "large": _picture(shown, shown.abs().max().item(), _LARGE),
        "small": [_picture(matrix, largest, _THUMBNAIL) for matrix in matrices],
    }
    _reading(key=key, data=data, on_token_change=on_token, on_head_change=on_head)


def _picture(matrix: Float[Tensor, "query source"], largest: float, pixels: int) -> dict[str, Any]:
    """A matrix of at most so many rows, where one pixel shows the largest of those that fall on it."""
    size = min(len(matrix), pixels)
    parts = [adaptive_max_pool2d(each[None, None], size)[0, 0] for each in (matrix, -matrix)]
    return {"size": size, "values": _bytes(torch.where(parts[0] >= parts[1], parts[0], -parts[1]), largest)}


def _bytes(values: Float[Tensor, "a b"], largest: float) -> str:
    """As signed bytes, 127 the largest."""
    scaled = (values * (127 / max(largest, 1e-12))).round().clamp(-127, 127).to(torch.int8)
    return base64.b64encode(scaled.numpy().tobytes()).decode()
