"""What gradients over every feature share: tiles of a batch that stay in the cache, and what a batch leaves behind.

Gradients are written by hand instead of by autograd, because then a tile of activations is made, used and
overwritten while it is in the cache: no `[batch, feature]` tensor is ever stored (`python -m benchmarks.steps` has the
same step with autograd). Each block (a head of one sweep point) is the same matmul, so any number of them is one
batched matmul; a CPU, which gains nothing from that, takes them one at a time.

Shapes: `block` is (point, head), blocks of one point together; x is shared by all points. Losses are
means over the batch of B tokens of the sums that the recipes name.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Params = dict[str, Tensor]

_TILE_ROWS = 512  # with 2,048 features 4 MB: large enough for the matmul, small enough for the cache


class Outcome(NamedTuple):
    """What one batch says about the SAEs."""

    grads: Params
    """Gradient of every parameter."""
    error: Float[Tensor, "block batch width"]
    """x_hat - x."""
    fired: Float[Tensor, "block feature"]
    """Tokens of the batch on which each feature is active."""
    terms: dict[str, Float[Tensor, " block"]]
    """Terms of the loss beside the squared error, before their coefficient."""


class Tile(NamedTuple):
    """A part of the batch for some blocks."""

    blocks: slice
    rows: slice
    x: Float[Tensor, "chunk row width"]


def empty_outcome(params: Params, x: Float[Tensor, "head batch width"]) -> Outcome:
    """Gradients of zero, and room for the error."""
    grads = {name: torch.zeros_like(value) for name, value in params.items()}
    error = x.new_empty(len(params["W_enc"]), *x.shape[1:])
    return Outcome(grads, error, torch.zeros_like(params["b_enc"]), {})


def tiles(x: Float[Tensor, "head batch width"], n_blocks: int) -> Iterator[Tile]:
    """On a CPU one block and some rows at a time; elsewhere everything at once."""
    n_heads, batch, _ = x.shape
    if x.device.type != "cpu":
        yield Tile(slice(0, n_blocks), slice(0, batch), x.repeat(n_blocks // n_heads, 1, 1))
        return
    for block in range(n_blocks):
        for start in range(0, batch, _TILE_ROWS):
            rows = slice(start, min(start + _TILE_ROWS, batch))
            yield Tile(slice(block, block + 1), rows, x[block % n_heads, None, rows])


def linear(
    x: Float[Tensor, "b r i"], weight: Float[Tensor, "b i o"], bias: Float[Tensor, "b o"]
) -> Float[Tensor, "b r o"]:
    """x W + b of every block."""
    return torch.baddbmm(bias[:, None], x, weight)


def into_encoder(
    grads: Params, blocks: slice, inputs: Float[Tensor, "b r width"], dpre: Float[Tensor, "b r feature"]
) -> None:
    """Add the gradient of pre-activations to those of W_enc and b_enc."""
    grads["W_enc"][blocks].baddbmm_(inputs.mT, dpre)
    grads["b_enc"][blocks] += dpre.sum(1)


def into_b_dec(out: Outcome, params: Params, centred: bool) -> None:
    """Through the reconstruction, and where b_dec is subtracted from the input, through the encoder."""
    out.grads["b_dec"].add_(out.error.sum(1), alpha=2 / out.error.shape[1])
    if centred:
        out.grads["b_dec"].sub_((params["W_enc"] @ out.grads["b_enc"][..., None])[..., 0])
