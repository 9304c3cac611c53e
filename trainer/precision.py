"""In which precision a GPU multiplies float32 matrices."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32(device: str, wanted: bool) -> Iterator[None]:
    """Matmuls in TF32 (10 bits of mantissa, sums in float32), where wanted and on a GPU; afterwards as before."""
    before = torch.get_float32_matmul_precision()
    if wanted and torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def matmuls_are_tf32(device: torch.device) -> bool:
    """Whether they are now, so that what they give is not taken for the float32 one."""
    return device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
