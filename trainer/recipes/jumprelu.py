"""jumprelu: |x - x_hat|^2 + coefficient * sum_i tanh(c f_i |d_i|) + lambda_P sum_i relu(e^t_i - pre_i) |d_i|.

f = pre where pre > e^t, else 0, with straight-through df/dt = -(e^t / eps) rect((pre - e^t) / eps),
df/dpre = 1[pre > e^t]. Anthropic, Circuits Updates January 2025, "Dictionary Learning Optimization
Techniques", after Rajamanoharan et al. 2024 (arXiv:2407.14435); every parameter gets the gradient.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.kernels.dense import Outcome, Params, Tile, empty_outcome, into_b_dec, into_encoder, linear, over_tiles
from trainer.recipes.recipe import Recipe, Step

TANH_SCALE, BANDWIDTH, PRE_ACTIVATION_COEFFICIENT = 4.0, 2.0, 3e-6  # c, eps, lambda_P
_JUMP_AT_START, _SHARE_ACTIVE_AT_START = 0.1, 0.1


def start(params: Params, x: Float[Tensor, "row block width"], init: str) -> Params:
    """Thresholds of 0.1; encoder biases at which each feature fires on the same share of the data.

    The source's share is for a large dictionary; here it does not depend on the number of features.
    """
    jumps = {"log_threshold": torch.full_like(params["b_enc"], math.log(_JUMP_AT_START))}
    if init == "transpose":
        rank = max(1, int(_SHARE_ACTIVE_AT_START * len(x)))
        W_enc = params["W_enc"]
        limits = [(x[:, block] @ W_enc[block]).topk(rank, dim=0).values[-1] for block in range(len(W_enc))]
        jumps["b_enc"] = _JUMP_AT_START - torch.stack(limits)
    return params | jumps


def gradients(params: Params, x: Float[Tensor, "head batch width"], step: Step) -> Outcome:
    """Of the loss above."""
    coefficient = step.coefficient
    W_enc, b_enc, W_dec, b_dec = (params[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    batch = x.shape[1]
    norm, threshold = W_dec.norm(dim=-1), params["log_threshold"].exp()
    cn, weight, weight_p = TANH_SCALE * norm, coefficient[:, None] / batch, PRE_ACTIVATION_COEFFICIENT / batch
    out = empty_outcome(params, x)
    penalty, below, d_norm = (torch.zeros_like(b_enc) for _ in range(3))

    def add(tile: Tile) -> None:
        blocks, rows, target = tile
        pre = linear(target, W_enc[blocks], b_enc[blocks])
        jump = threshold[blocks, None]
        is_open = (pre > jump).to(pre.dtype)
        f = pre * is_open
        error = torch.sub(linear(f, W_dec[blocks], b_dec[blocks]), target, out=out.error[blocks, rows])
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
        into_encoder(out.grads, blocks, target, dpre)
        penalty[blocks] += tanh.sum(1)
        d_norm[blocks] += weight[blocks] * TANH_SCALE * (f * slope).sum(1)
        below[blocks] += short.sum(1)
        out.grads["log_threshold"][blocks] += weight_p * (norm * threshold)[blocks] * closed.sum(1)
        out.fired[blocks] += is_open.sum(1)

    over_tiles(add, x, len(W_enc))
    out.grads["W_dec"].add_(W_dec * ((d_norm + weight_p * below) / norm)[..., None])
    into_b_dec(out, params, centred=False)
    out.terms["tanh"] = penalty.sum(1) / batch
    out.terms["pre_activation"] = (below * norm).sum(1) / batch
    return out


def for_use(params: Params, threshold: Float[Tensor, " group"]) -> Params:
    """The threshold itself instead of its logarithm."""
    return params | {"threshold": params["log_threshold"].exp()}


RECIPE = Recipe(
    defaults={"l1_coefficient": 2.0, "sparsity_warm_up_fraction": 1.0, "lr": 2e-3},
    gradients=gradients,
    activation="jumprelu",
    weights={"pre_activation": PRE_ACTIVATION_COEFFICIENT},
    start=start,
    for_use=for_use,
)
