"""The n-th largest of many values, of which every process has some."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trainer import ranks


def nth_largest(groups: Sequence[Float[Tensor, " _"]], counts: Sequence[int]) -> Float[Tensor, " group"]:
    """The `counts[g]`-th largest of the positive values of each group; the least where there are fewer, 0 without any.

    Args:
        groups: the values of this process; those of all count.
        counts: one or more.
    """
    if ranks.size() > 1:
        return _over_ranks(groups, torch.tensor(counts, device=groups[0].device))
    return torch.stack([_nth(values, count) for values, count in zip(groups, counts, strict=True)])


def _nth(values: Float[Tensor, " value"], count: int) -> Float[Tensor, ""]:
    if len(values) == 0:
        return values.new_zeros(())
    if values.device.type == "cpu":
        return values.kthvalue(max(len(values) - count, 0) + 1).values
    # Sorted, because kthvalue of one row occupies one multiprocessor: 7.6 ms of 790,000 values on an H200.
    return values.sort(descending=True).values[min(count, len(values)) - 1]


def _over_ranks(groups: Sequence[Float[Tensor, " _"]], counts: Tensor) -> Float[Tensor, " group"]:
    """Bits of positive floats are ordered as the floats are, so a byte of the result is found at a time, from the
    highest: by how many values with the bytes found so far have each next one. Exact, in four sums of 256 counts."""
    n, values = len(groups), torch.cat(list(groups))
    sizes = torch.tensor([len(each) for each in groups], device=values.device)
    group = torch.arange(n, device=values.device).repeat_interleave(sizes)
    sizes = ranks.total(sizes)
    counts = counts.minimum(sizes)
    bits = values.view(torch.int32 if values.itemsize == 4 else torch.int64).long()
    found = torch.zeros(n, dtype=torch.int64, device=values.device)
    for shift in range(8 * values.itemsize - 8, -1, -8):
        # Shifted twice: by all 64 bits at once nothing would move.
        alike = bits >> shift >> 8 == found[group]
        byte = bits[alike] >> shift & 255
        having = ranks.total(torch.bincount(group[alike] * 256 + byte, minlength=n * 256)).view(n, 256)
        at_least = having.flip(1).cumsum(1).flip(1)  # values whose byte is this one or higher
        byte = (at_least >= counts[:, None]).sum(1).sub(1).clamp_min(0)
        counts = counts - (at_least - having).gather(1, byte[:, None])[:, 0]
        found = found * 256 + byte
    nth = found.to(torch.int32 if values.itemsize == 4 else torch.int64).view(values.dtype)
    return nth.where(sizes > 0, 0.0)
