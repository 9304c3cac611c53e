"""Means over tokens with errors that know that tokens of one context are not independent."""

import torch
from jaxtyping import Float
from torch import Tensor


def ratio(
    numerator: Float[Tensor, "... #cluster"], denominator: Float[Tensor, "... #cluster"]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """A ratio of sums over clusters, and its standard error clustered, in float64.

    r = Σ_c n_c / Σ_c d_c, se² = C/(C-1) · Σ_c (n_c - r d_c)² / (Σ_c d_c)²: linearised, as for a ratio estimator of
    cluster samples (Cochran 1977, Sampling Techniques, 6.3 and 9A). A mean over tokens is the ratio of a context's sum
    to its number of tokens.

    Args:
        numerator, denominator: of each cluster (a context); they broadcast.

    Returns:
        Value and error: the error is nan of a single cluster, both where the denominators sum to 0.
    """
    n, d = torch.broadcast_tensors(numerator.double(), denominator.double())
    total = d.sum(-1)
    value = n.sum(-1) / total
    value = value.where(total != 0, torch.nan)
    clusters = n.shape[-1]
    left = (n - value[..., None] * d).pow(2).sum(-1)
    se = (left * clusters / max(clusters - 1, 1)).sqrt() / total.abs()
    return value, se if clusters > 1 else torch.full_like(se, torch.nan)


def mean(values: Float[Tensor, "*kind context token"]) -> tuple[Float[Tensor, "*kind"], Float[Tensor, "*kind"]]:
    """A mean over tokens, and its standard error clustered by context, in float64."""
    return ratio(values.double().sum(-1), torch.tensor([float(values.shape[-1])], device=values.device))
