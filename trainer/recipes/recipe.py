"""What a recipe is: every other file here ends with one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from trainer.kernels.dense import Outcome, Params


class Step(NamedTuple):
    """What a recipe is told about a step beside parameters and batch; of the points of one pass."""

    coefficient: Float[Tensor, " block"]
    """of the sparsity penalty, warmed up"""
    k: tuple[int, ...]
    """of each point"""
    over_layer: bool
    """k counts features of a token over all heads, which compete; else each head has k"""
    active_share: float
    """of the features, on the batch before; only where work is done in tiles"""
    threshold: Float[Tensor, " group"]
    """running mean of the smallest activation that is kept, of the points (over_layer) or blocks; updated in place"""
    guess: Float[Tensor, " group"]
    """where to look for the next one; NaN at first; updated in place"""
    rate: float
    """of the running mean"""


def _unchanged(params: Params, *context: Any) -> Params:
    return params


@dataclass(frozen=True)
class Recipe:
    """Loss, constraints and what becomes of the weights."""

    defaults: dict[str, Any]
    """options of an SAE that neither a preset nor the user sets; what is left out has the common default"""
    gradients: Callable[[Params, Tensor, Step], Outcome]
    """of the loss by every parameter, on scaled inputs [head, batch, width]"""
    sparsity: Literal["l1_coefficient", "k"] = "l1_coefficient"
    """which option says how sparse it becomes"""
    activation: Literal["relu", "jumprelu", "topk"] = "relu"
    """of the SAE for use"""
    centred: bool = False
    """b_dec is subtracted from the input of the encoder"""
    resamples: bool = False
    """dead features may be resampled (Bricken et al. 2023)"""
    weights: dict[str, float] = field(default_factory=dict)
    """coefficients of terms of the loss that the sparsity coefficient does not scale"""
    start: Callable[[Params, Float[Tensor, "row block width"], str], Params] = _unchanged
    """parameters before the first step, from the common ones, rows of inputs, and `init`"""
    for_use: Callable[[Params, Float[Tensor, " group"]], Params] = _unchanged
    """what BlockDiagSAE takes, from what was trained and the running threshold"""
