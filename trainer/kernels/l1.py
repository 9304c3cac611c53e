"""ReLU features with a penalty that is linear in them: the gradients of april and bricken.

Two ways to the same result, to float rounding: over every feature (`dense`), or over the active ones only
(`sparse`), which is faster on a CPU once few are.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.kernels import dense, sparse
from trainer.kernels.dense import Outcome, Params

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
    way = _sparse if dense.in_tiles(x) and active_share < SPARSE_BELOW else _dense
    return way(params, x, coefficient, norm, centred)


def _dense(
    params: Params,
    x: Float[Tensor, "head batch width"],
    coefficient: Float[Tensor, " block"],
    norm: Float[Tensor, "block feature"] | None,
    centred: bool,
) -> Outcome:
    W_dec, b_enc, batch = params["W_dec"], params["b_enc"], x.shape[1]
    weight = (coefficient / batch)[:, None]
    slope = weight * (torch.ones_like(b_enc) if norm is None else norm)  # d penalty / d f
    out, total = dense.gradients(params, x, lambda pre: pre.clamp_(min=0), slope, centred)
    if norm is not None:
        out.grads["W_dec"].add_(W_dec * (weight * total / norm)[..., None])
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
