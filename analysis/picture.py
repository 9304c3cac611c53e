"""Matrices as bytes, small enough to be drawn by a page."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Picture(NamedTuple):
    """A square matrix as a page draws it."""

    size: int
    values: bytes
    """signed, row by row, 127 the largest of what it is compared with"""


def in_bytes(values: Float[Tensor, "query source"], largest: float) -> bytes:
    """Signed bytes, of which 127 means `largest`."""
    scaled = values * (127 / max(largest, 1e-12))
    return scaled.round().clamp(-127, 127).to(torch.int8).numpy().tobytes()
