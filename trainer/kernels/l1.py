"""ReLU features with a penalty that is linear in them: the gradients of april and bricken.

Two ways to the same result, to float rounding: over every feature in tiles (`dense`), or over the active ones
only (`sparse`), which is faster once few are.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.kernels import sparse
from trainer.kernels.dense import Outcome, Params, empty_outcome, into_b_dec, into_encoder, linear, tiles

# Share of active features below which the sparse gradients are faster; at 0.05 both cost the same
# (benchmarks/README.md).
SPARSE_BELOW = 0.03


def gradients(
    params: Params,
    x: Float[Tensor, "head batch width"],
    coefficient: Float[Tensor, " block"],
    active_share: float,
    weighted: bool,
    centred: bool,
) -> Outcome:
    """|x - x_hat|^2 + coefficient * sum_i f_i (|d_i| if weighted), f = relu(x W_enc + b_enc), mean over the batch.

    Args:
        active_share: of the features, on the batch before.
        weighted: the penalty counts the length of a feature's decoder row.
        centred: b_dec is subtracted from the input of the encoder.
    """
    norm = params["W_dec"].norm(dim=-1) if weighted else None
    way = _sparse if active_share < SPARSE_BELOW else _dense
    return way(params, x, coefficient, norm, centred)


def _dense(
    params: Params,
    x: Float[Tensor, "head batch width"],
    coefficient: Float[Tensor, " block"],
    norm: Float[Tensor, "block feature"] | None,
    centred: bool,
) -> Outcome:
    W_enc, b_enc, W_dec, b_dec = (params[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    batch = x.shape[1]
    slope = (coefficient / batch)[:, None] * (torch.ones_like(b_enc) if norm is None else norm)  # d penalty / d f
    out, total = empty_outcome(params, x), torch.zeros_like(b_enc)
    for blocks, rows, target in tiles(x, len(W_enc)):
        inputs = target - b_dec[blocks, None] if centred else target
        f = linear(inputs, W_enc[blocks], b_enc[blocks]).clamp_(min=0)
        error = torch.sub(linear(f, W_dec[blocks], b_dec[blocks]), target, out=out.error[blocks, rows])
        g = error * (2 / batch)
        total[blocks] += f.sum(1)
        out.grads["W_dec"][blocks].baddbmm_(f.mT, g)
        dpre = linear(g, W_dec[blocks].mT, slope[blocks])
        # The gradient of relu, in place; f is positive exactly where its input was.
        torch.ops.aten.threshold_backward.grad_input(dpre, f, 0.0, grad_input=dpre)
        into_encoder(out.grads, blocks, inputs, dpre)
        out.fired[blocks] += f.sign_().sum(1)
    if norm is not None:
        out.grads["W_dec"].add_(W_dec * ((coefficient / batch)[:, None] * total / norm)[..., None])
    into_b_dec(out, params, centred)
    out.terms["l1"] = (total if norm is None else total * norm).sum(1) / batch
    return out


def _sparse(
    params: Params,
    x: Float[Tensor, "head batch width"],
    coefficient: Float[Tensor, " block"],
    norm: Float[Tensor, "block feature"] | None,
    centred: bool,
) -> Outcome:
    W_enc, W_dec, b_enc = params["W_enc"], params["W_dec"], params["b_enc"]
    bias = b_enc - (params["b_dec"][:, None] @ W_enc)[:, 0] if centred else b_enc
    active = sparse.above({**params, "b_enc": bias}, x, torch.zeros_like(coefficient))
    weight = (coefficient / x.shape[1])[:, None]
    slope = weight * (torch.ones_like(b_enc) if norm is None else norm)  # d penalty / d f
    out = sparse.gradients(params, x, active, slope, centred)
    total = torch.zeros_like(b_enc).view(-1).index_add_(0, active.feature, active.value).view_as(b_enc)
    if norm is not None:
        out.grads["W_dec"].add_(W_dec * (weight * total / norm)[..., None])
    out.terms["l1"] = (total if norm is None else total * norm).sum(1) / x.shape[1]
    return out
