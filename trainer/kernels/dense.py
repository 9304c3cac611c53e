"""What gradients over every feature share: tiles of a batch that stay in the cache, and what a batch leaves behind.

Gradients are written by hand instead of by autograd, because then a tile of activations is made, used and
overwritten while it is in the cache: no `[batch, feature]` tensor is ever stored (`python -m benchmarks.steps` has the
same step with autograd). Each block (a head of one sweep point) is the same matmul, so any number of them is one
batched matmul; a CPU, which gains nothing from that, takes them one at a time.

Shapes: `block` is (point, head), blocks of one point together; x is shared by all points. Losses are
means over the batch of B tokens of the sums that the recipes name.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.kernels import workers

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


def in_tiles(x: Tensor) -> bool:
    """Whether work is done tile by tile and on active features alone, as suits a CPU, or on everything at once."""
    return x.device.type == "cpu"


def over_tiles(work: Callable[[Tile], None], x: Float[Tensor, "head batch width"], n_blocks: int) -> None:
    """Do the work of every tile: blocks side by side and the rows of each one after the other, or everything at once.

    Args:
        work: adds what a tile says to what its blocks have.
    """
    n_heads, batch, _ = x.shape
    if not in_tiles(x):
        work(Tile(slice(0, n_blocks), slice(0, batch), x.repeat(n_blocks // n_heads, 1, 1)))
        return

    def of_block(block: int) -> None:
        for start in range(0, batch, _TILE_ROWS):
            rows = slice(start, min(start + _TILE_ROWS, batch))
            work(Tile(slice(block, block + 1), rows, x[block % n_heads, None, rows]))

    workers.each(of_block, range(n_blocks))


def gradients(
    params: Params,
    x: Float[Tensor, "head batch width"],
    activate: Callable[[Tensor], Tensor],
    slope: Float[Tensor, "block feature"] | None = None,
    centred: bool = False,
) -> tuple[Outcome, Float[Tensor, "block feature"]]:
    """|x - x_hat|^2 + sum_i slope_i f_i, mean over the batch, f = activate(x W_enc + b_enc).

    Args:
        activate: turns the pre-activations of a tile into activations, in place or not: each either stays what it is,
            and is then positive, or becomes 0.
        slope: derivative of the penalty by the activations (with its coefficient).
        centred: b_dec is subtracted from the input of the encoder.

    Returns:
        What the batch says, and the sum of each feature's activations.
    """
    out, total = empty_outcome(params, x), torch.zeros_like(params["b_enc"])
    over_tiles(lambda tile: _add(tile, params, activate, slope, centred, out, total), x, len(total))
    into_b_dec(out, params, centred)
    return out, total


def _add(
    tile: Tile,
    params: Params,
    activate: Callable[[Tensor], Tensor],
    slope: Float[Tensor, "block feature"] | None,
    centred: bool,
    out: Outcome,
    total: Float[Tensor, "block feature"],
) -> None:
    """What a tile adds to the outcome."""
    blocks, rows, target = tile
    W_enc, b_enc, W_dec, b_dec = (params[name][blocks] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    inputs = target - b_dec[:, None] if centred else target
    f = activate(linear(inputs, W_enc, b_enc))
    error = torch.sub(linear(f, W_dec, b_dec), target, out=out.error[blocks, rows])
    g = error * (2 / out.error.shape[1])
    total[blocks] += f.sum(1)
    out.grads["W_dec"][blocks].baddbmm_(f.mT, g)
    dpre = torch.bmm(g, W_dec.mT) if slope is None else linear(g, W_dec.mT, slope[blocks])
    # The gradient of relu, in place: f is positive exactly where it passes its input on.
    torch.ops.aten.threshold_backward.grad_input(dpre, f, 0.0, grad_input=dpre)
    into_encoder(out.grads, blocks, inputs, dpre)
    out.fired[blocks] += f.sign_().sum(1)


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
