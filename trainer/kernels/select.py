"""Selection among all pre-activations at once, as a GPU does it; the rest of the step then is dense.

A block-diagonal matmul costs a GPU less than gathering the rows of active features, so nothing is made of pairs.
Pre-activations are `[block, token, feature]`; what is not selected becomes 0.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trainer import ranks
from trainer.kernels.order import nth_largest
from trainer.kernels.sparse import top_of_rows

Pre = Float[Tensor, "block token feature"]


def top_k(pre: Pre, k: Sequence[int], layer: bool) -> Pre:
    """The k largest pre-activations of each token, of each head or over the heads of a point, where positive.

    Gao et al. 2024 (arXiv:2406.04093). Where the k-th is met twice, both are kept.

    Args:
        k: of each point.
    """
    points = pre.view(len(k), -1, *pre.shape[1:])  # [point, head, token, feature]
    rows = points.transpose(1, 2).flatten(2)[:, None] if layer else points
    largest, _ = top_of_rows(rows, max(k))
    smallest = torch.stack([values[..., n - 1, None] for values, n in zip(largest, k, strict=True)])
    return _at_least(points, smallest).view_as(pre)


def at_least(pre: Pre, smallest: Float[Tensor, " group"]) -> Pre:
    """What reaches the threshold of its group of blocks, where positive."""
    return _at_least(pre.view(len(smallest), -1, *pre.shape[1:]), smallest[:, None, None, None]).view_as(pre)


def _at_least(pre: Tensor, smallest: Tensor) -> Tensor:
    return torch.where(pre >= smallest.clamp_min(torch.finfo(pre.dtype).tiny), pre, 0.0)


@torch.compiler.disable
def smallest_kept(pre: Pre, counts: Sequence[int], guess: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
    """The `counts[g]`-th largest pre-activation of the batch in every group of blocks; where fewer are positive, the
    least positive one, or 0.

    Bussmann et al. 2024 (arXiv:2412.06410). As in `sparse.batch_top_k` only what exceeds a guess is sorted.

    Args:
        counts: features to keep, k times the batch of all processes; groups are the blocks, or the points.
        guess: a threshold for every group; NaN where there is none.
    """
    rows = pre.view(len(counts), -1)
    lows = [0.0 if math.isnan(low) else max(low, 0.0) for low in guess.tolist()]
    found = [row[row > low] for row, low in zip(rows, lows, strict=True)]
    while True:
        sizes = ranks.total(torch.tensor([len(values) for values in found])).tolist()
        short = [g for g, low in enumerate(lows) if sizes[g] < counts[g] and low > 0]
        if not short:
            return nth_largest(found, counts)
        for g in short:
            lows[g] = lows[g] * 0.7 if lows[g] > 1e-3 else 0.0
            found[g] = rows[g][rows[g] > lows[g]]
