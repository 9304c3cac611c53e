"""Where heads read from, as a matrix of every destination and source."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from analysis.picture import Picture, in_bytes
from analysis.prompt.run import PromptRun, positive_dfa

ATTENTION, ACTIVE, FEATURE = KINDS = ("Attention", "DFA of the features that fire", "DFA of the feature")
_SMALL, _LARGE = 64, 224  # rows of a picture at most, as the page draws them


class Drawn(NamedTuple):
    """What a page draws of `matrices`, as bytes."""

    largest: float
    """of the matrix shown: what 127 means in it"""
    matrix: bytes
    """of the head shown, or the mean over all: signed [query, source]"""
    large: Picture
    """the same"""
    small: list[Picture]
    """of every head, on one scale"""


def matrices(run: PromptRun, kind: str, feature: tuple[int, int] | None = None) -> Float[Tensor, "head query source"]:
    """What every destination takes from every source, per head.

    Attention: A[q, s]. DFA of the features that fire: the sum of their positive parts, as the roles count them. DFA of
    the feature: A[q, s] (v[s] - b_V) . w at every destination, whether it fires there or not; 0 for heads that it does
    not read.

    Args:
        feature: block, and index in it; for the last kind.

    Raises:
        ValueError: no feature is given where one is needed.
    """
    if kind == ATTENTION:
        return run.pattern
    if kind == ACTIVE:
        return positive_dfa(run)
    if feature is None:
        raise ValueError("choose a feature first")
    block, index = feature
    out = torch.zeros_like(run.pattern)
    for head in range(len(out)) if run.dense else [block]:
        out[head] = run.pattern[head] * run.reads(head, [index])[:, 0]
    return out


def drawn(matrices: Float[Tensor, "head query source"], head: int | None) -> Drawn:
    """Pictures of every head, and of the one shown, or the mean over all."""
    shown = matrices.mean(0) if head is None else matrices[head]
    most, of_all = shown.abs().max().item(), matrices.abs().max().item()
    small = [_picture(matrix, of_all, _SMALL) for matrix in matrices]
    return Drawn(most, in_bytes(shown, most), _picture(shown, most, _LARGE), small)


def _picture(matrix: Float[Tensor, "query source"], largest: float, size: int) -> Picture:
    """Of a matrix that is larger, a number stands for several: the largest of them in size."""
    size = min(len(matrix), size)
    up, down = (adaptive_max_pool2d(each[None, None], size)[0, 0] for each in (matrix, -matrix))
    return Picture(size, in_bytes(torch.where(up >= down, up, -down), largest))
