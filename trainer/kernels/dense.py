"""Loss and gradients of the recipes that look at every feature: april, bricken, jumprelu, gated.

Written by hand instead of by autograd, because then a tile of activations is made, used and
overwritten while it is in the cache: no `[batch, feature]` tensor is ever stored. Each block (a head of
one sweep point) is the same matmul, so any number of them is one batched matmul; a CPU, which gains
nothing from that, takes them one at a time.

Shapes: `block` is (point, head), blocks of one point together; x is shared by all points. Losses are
means over the batch of B tokens of the sums below, |.| is the Euclidean norm, d_i a decoder row.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Params = dict[str, Tensor]

TANH_SCALE, BANDWIDTH, PRE_ACTIVATION_COEFFICIENT = 4.0, 2.0, 3e-6  # c, epsilon, lambda_P of jumprelu
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


class _Tile(NamedTuple):
    blocks: slice
    rows: slice
    x: Float[Tensor, "chunk row width"]


def april(params: Params, x: Float[Tensor, "head batch width"], coefficient: Float[Tensor, " block"]) -> Outcome:
    """|x - x_hat|^2 + coefficient * sum_i f_i |d_i|, f = relu(x W_enc + b_enc).

    Anthropic, Circuits Updates April 2024, "Update on how we train SAEs": weighting by |d_i| keeps the
    decoder free, because shrinking f and growing d no longer lowers the penalty.
    """
    return _relu(params, x, coefficient, params["W_dec"].norm(dim=-1), centred=False)


def bricken(params: Params, x: Float[Tensor, "head batch width"], coefficient: Float[Tensor, " block"]) -> Outcome:
    """|x - x_hat|^2 + coefficient * sum_i f_i, f = relu((x - b_dec) W_enc + b_enc), rows of norm 1.

    Bricken et al. 2023, "Towards Monosemanticity". The norm is kept by `Stack`.
    """
    return _relu(params, x, coefficient, None, centred=True)


def _relu(
    params: Params, x: Tensor, coefficient: Tensor, norm: Float[Tensor, "block feature"] | None, centred: bool
) -> Outcome:
    W_enc, b_enc, W_dec, b_dec = (params[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    batch = x.shape[1]
    slope = (coefficient / batch)[:, None] * (torch.ones_like(b_enc) if norm is None else norm)  # d penalty / d f
    out, total = _empty_outcome(params, x), torch.zeros_like(b_enc)
    for blocks, rows, target in _tiles(x, len(W_enc)):
        inputs = target - b_dec[blocks, None] if centred else target
        f = _linear(inputs, W_enc[blocks], b_enc[blocks]).clamp_(min=0)
        error = torch.sub(_linear(f, W_dec[blocks], b_dec[blocks]), target, out=out.error[blocks, rows])
        g = error * (2 / batch)
        total[blocks] += f.sum(1)
        out.grads["W_dec"][blocks].baddbmm_(f.mT, g)
        dpre = _linear(g, W_dec[blocks].mT, slope[blocks])
        # The gradient of relu, in place; f is positive exactly where its input was.
        torch.ops.aten.threshold_backward.grad_input(dpre, f, 0.0, grad_input=dpre)
        _into_encoder(out.grads, blocks, inputs, dpre)
        out.fired[blocks] += f.sign_().sum(1)
    if norm is not None:
        out.grads["W_dec"].add_(W_dec * ((coefficient / batch)[:, None] * total / norm)[..., None])
    _into_b_dec(out, params, centred)
    out.terms["l1"] = (total if norm is None else total * norm).sum(1) / batch
    return out


def jumprelu(params: Params, x: Float[Tensor, "head batch width"], coefficient: Float[Tensor, " block"]) -> Outcome:
    """|x - x_hat|^2 + coefficient * sum_i tanh(c f_i |d_i|) + lambda_P sum_i relu(e^t_i - pre_i) |d_i|.

    f = pre where pre > e^t, else 0, with straight-through df/dt = -(e^t / eps) rect((pre - e^t) / eps),
    df/dpre = 1[pre > e^t]. Anthropic, Circuits Updates January 2025, "Dictionary Learning Optimization
    Techniques", after Rajamanoharan et al. 2024 (arXiv:2407.14435); every parameter gets the gradient.
    """
    W_enc, b_enc, W_dec, b_dec = (params[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    batch = x.shape[1]
    norm, threshold = W_dec.norm(dim=-1), params["log_threshold"].exp()
    cn, weight, weight_p = TANH_SCALE * norm, coefficient[:, None] / batch, PRE_ACTIVATION_COEFFICIENT / batch
    out = _empty_outcome(params, x)
    penalty, below, d_norm = (torch.zeros_like(b_enc) for _ in range(3))
    for blocks, rows, target in _tiles(x, len(W_enc)):
        pre = _linear(target, W_enc[blocks], b_enc[blocks])
        jump = threshold[blocks, None]
        is_open = (pre > jump).to(pre.dtype)
        f = pre * is_open
        error = torch.sub(_linear(f, W_dec[blocks], b_dec[blocks]), target, out=out.error[blocks, rows])
        g = error * (2 / batch)
        out.grads["W_dec"][blocks].baddbmm_(f.mT, g)
        tanh = torch.tanh(f * cn[blocks, None])
        slope = 1 - tanh * tanh  # d tanh(c f |d|) / d(c f |d|)
        df = torch.bmm(g, W_dec[blocks].mT).add_(slope * (weight * cn)[blocks, None])
        near = ((pre - jump).abs() < BANDWIDTH / 2).to(pre.dtype)
        out.grads["log_threshold"][blocks] -= (df * near).sum(1) * threshold[blocks] / BANDWIDTH
        short = (jump - pre).clamp_(min=0)
        closed = short.sign()
        dpre = df.mul_(is_open).sub_(closed * (weight_p * norm)[blocks, None])
        _into_encoder(out.grads, blocks, target, dpre)
        penalty[blocks] += tanh.sum(1)
        d_norm[blocks] += weight[blocks] * TANH_SCALE * (f * slope).sum(1)
        below[blocks] += short.sum(1)
        out.grads["log_threshold"][blocks] += weight_p * (norm * threshold)[blocks] * closed.sum(1)
        out.fired[blocks] += is_open.sum(1)
    out.grads["W_dec"].add_(W_dec * ((d_norm + weight_p * below) / norm)[..., None])
    _into_b_dec(out, params, centred=False)
    out.terms["tanh"] = penalty.sum(1) / batch
    out.terms["pre_activation"] = (below * norm).sum(1) / batch
    return out


def gated(params: Params, x: Float[Tensor, "head batch width"], coefficient: Float[Tensor, " block"]) -> Outcome:
    """|x - x_hat|^2 + coefficient * sum_i relu(gate_i) + |x - x_hat(relu(gate))|^2 with the decoder frozen in the last.

    s = (x - b_dec) W_enc, gate = s + b_enc, f = 1[gate > 0] relu(e^r s + b_mag), decoder rows of norm 1.
    Rajamanoharan et al. 2024 (arXiv:2404.16014).
    """
    W_enc, W_dec, b_dec = (params[name] for name in ("W_enc", "W_dec", "b_dec"))
    batch = x.shape[1]
    gain = params["r_mag"].exp()
    out = _empty_outcome(params, x)
    penalty, auxiliary = torch.zeros_like(gain), torch.zeros_like(coefficient)
    for blocks, rows, target in _tiles(x, len(W_enc)):
        inputs = target - b_dec[blocks, None]
        s = torch.bmm(inputs, W_enc[blocks])
        gate = (s + params["b_enc"][blocks, None]).clamp_(min=0)
        is_open = gate.sign()
        f = (s * gain[blocks, None] + params["b_mag"][blocks, None]).clamp_(min=0).mul_(is_open)
        error = torch.sub(_linear(f, W_dec[blocks], b_dec[blocks]), target, out=out.error[blocks, rows])
        g = error * (2 / batch)
        out.grads["W_dec"][blocks].baddbmm_(f.mT, g)
        d_mag = torch.bmm(g, W_dec[blocks].mT).mul_(f.sign())
        frozen = _linear(gate, W_dec[blocks], b_dec[blocks]) - target
        slope = (coefficient / batch)[blocks, None, None]
        d_gate = torch.bmm(frozen * (2 / batch), W_dec[blocks].mT).add_(slope).mul_(is_open)
        out.grads["b_mag"][blocks] += d_mag.sum(1)
        out.grads["r_mag"][blocks] += (d_mag * s).sum(1) * gain[blocks]
        out.grads["b_enc"][blocks] += d_gate.sum(1)
        ds = d_mag.mul_(gain[blocks, None]).add_(d_gate)
        out.grads["W_enc"][blocks].baddbmm_(inputs.mT, ds)
        out.grads["b_dec"][blocks] -= (W_enc[blocks] @ ds.sum(1)[..., None])[..., 0]
        penalty[blocks] += gate.sum(1)
        auxiliary[blocks] += frozen.pow(2).sum((1, 2))
        out.fired[blocks] += f.sign_().sum(1)
    out.grads["b_dec"].add_(out.error.sum(1), alpha=2 / batch)
    out.terms["l1"] = penalty.sum(1) / batch
    out.terms["auxiliary"] = auxiliary / batch
    return out


def _empty_outcome(params: Params, x: Tensor) -> Outcome:
    grads = {name: torch.zeros_like(value) for name, value in params.items()}
    error = x.new_empty(len(params["W_enc"]), *x.shape[1:])
    return Outcome(grads, error, torch.zeros_like(params["b_enc"]), {})


def _tiles(x: Float[Tensor, "head batch width"], n_blocks: int) -> Iterator[_Tile]:
    """On a CPU one block and some rows at a time; elsewhere everything at once."""
    n_heads, batch, _ = x.shape
    if x.device.type != "cpu":
        yield _Tile(slice(0, n_blocks), slice(0, batch), x.repeat(n_blocks // n_heads, 1, 1))
        return
    for block in range(n_blocks):
        for start in range(0, batch, _TILE_ROWS):
            rows = slice(start, min(start + _TILE_ROWS, batch))
            yield _Tile(slice(block, block + 1), rows, x[block % n_heads, None, rows])


def _linear(x: Float[Tensor, "b r i"], weight: Float[Tensor, "b i o"], bias: Float[Tensor, "b o"]) -> Tensor:
    return torch.baddbmm(bias[:, None], x, weight)


def _into_encoder(grads: Params, blocks: slice, inputs: Tensor, dpre: Tensor) -> None:
    grads["W_enc"][blocks].baddbmm_(inputs.mT, dpre)
    grads["b_enc"][blocks] += dpre.sum(1)


def _into_b_dec(out: Outcome, params: Params, centred: bool) -> None:
    """Through the reconstruction, and where b_dec is subtracted from the input, through the encoder."""
    out.grads["b_dec"].add_(out.error.sum(1), alpha=2 / out.error.shape[1])
    if centred:
        out.grads["b_dec"].sub_((params["W_enc"] @ out.grads["b_enc"][..., None])[..., 0])


GRADIENTS: dict[str, Callable[[Params, Tensor, Tensor], Outcome]] = {
    "april": april,
    "bricken": bricken,
    "jumprelu": jumprelu,
    "gated": gated,
}
