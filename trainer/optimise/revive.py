"""What is done about dead features: AuxK for the TopK family, resampling for bricken."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from trainer import ranks
from trainer.kernels.dense import Params, in_tiles

_AUX_COEFFICIENT = 1 / 32


def aux_k(
    params: Params,
    x: Float[Tensor, "head batch width"],
    error: Float[Tensor, "block batch width"],
    dead: Bool[Tensor, "block feature"],
    n_points: int,
) -> tuple[Params, Float[Tensor, " point"]]:
    """(1/32) |e - e_hat|^2 Var(x) / Var(e): dead features learn to reconstruct what the living leave over.

    e = x - x_hat without gradient, e_hat = the decoding, without b_dec, of the width / 2 largest
    pre-activations of each block's dead features. Gao et al. 2024 (arXiv:2406.04093), A.2; they divide
    the squared error of x by Var(x), which is not done here, so this term is multiplied by it.

    Only the dead columns are computed: blocks with fewer dead features than others are padded.

    Returns:
        Gradients of W_enc, b_enc and W_dec, zero for living features, and the term of each point: of this process's
        rows, with variances of the whole batch.
    """
    n_blocks, batch, width = error.shape
    n_dead = int(dead.sum(1).max())
    columns = dead.int().topk(n_dead, dim=1).indices  # dead ones first
    real = dead.gather(1, columns)
    block = torch.arange(n_blocks, device=x.device)[:, None]
    leaves = {
        "W_enc": params["W_enc"].mT[block, columns],
        "b_enc": params["b_enc"][block, columns],
        "W_dec": params["W_dec"][block, columns],
    }
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    residual = -error.detach()
    of_residual, of_x = _deviations(residual, x)
    left_over = of_residual.view(n_points, -1).sum(1).clamp_min(1e-12) / of_x.sum()
    per_block = left_over.repeat_interleave(n_blocks // n_points)
    inputs = x if n_blocks == len(x) else x.repeat(n_blocks // len(x), 1, 1)
    k = min(max(1, width // 2), n_dead)
    term = x.new_zeros(n_blocks)
    with torch.enable_grad():
        for rows in torch.arange(batch, device=x.device).split(512 if in_tiles(x) else batch):
            pre = torch.baddbmm(leaves["b_enc"][:, None], inputs[:, rows], leaves["W_enc"].mT)
            pre = pre.masked_fill(~real[:, None], float("-inf"))
            top = pre.topk(k, dim=-1)
            # No relu: a feature that is negative everywhere could not come back.
            f = torch.zeros_like(pre).scatter(-1, top.indices, top.values.masked_fill(top.values.isinf(), 0.0))
            e_hat = torch.bmm(f, leaves["W_dec"])
            loss = _AUX_COEFFICIENT * (residual[:, rows] - e_hat).pow(2).sum((1, 2)) / batch / per_block
            loss.sum().backward()
            term += loss.detach()
    grads = {}
    for name in ("W_enc", "b_enc", "W_dec"):
        of_dead = leaves[name].grad
        assert of_dead is not None
        full = torch.zeros_like(params[name].mT if name == "W_enc" else params[name])
        full[block, columns] = of_dead * (real[..., None] if of_dead.dim() == 3 else real)
        grads[name] = full.mT.contiguous() if name == "W_enc" else full
    return grads, term.view(n_points, -1).sum(1)


def _deviations(*rows: Float[Tensor, "_ batch _"]) -> Sequence[Float[Tensor, " _"]]:
    """Squared, of every block, summed over the rows of all processes."""
    means, _ = ranks.reduced([x.mean(1, keepdim=True) for x in rows], [])
    return ranks.reduced([], [(x - mean).pow(2).sum((1, 2)) for x, mean in zip(rows, means, strict=True)])[1]


def resample(
    params: Params,
    moments: list[Params],
    x: Float[Tensor, "head batch width"],
    error: Float[Tensor, "block batch width"],
    dead: Bool[Tensor, "block feature"],
    generator: torch.Generator,
) -> None:
    """Point dead features, in place, at inputs that are reconstructed badly; the others are not touched.

    For every dead feature an input of the (whole) batch is drawn with probability proportional to its squared
    loss; W_dec = unit(x - b_dec), W_enc = 0.2 * mean encoder norm of the block's living features * that,
    b_enc = 0, Adam's moments 0. Bricken et al. 2023, "Neuron Resampling".
    """
    for block in range(len(dead)):
        which = dead[block].nonzero()[:, 0]
        if len(which) == 0:
            continue
        inputs = x[block % len(x)] - params["b_dec"][block]
        weight = error[block].pow(2).sum(-1).pow(2).cpu()
        if not weight.isfinite().all() or not weight.any():  # exploded, which the training loop says, or exact
            continue
        # One draw per row sequence on the CPU, so that a resumed run draws the same.
        drawn = torch.multinomial(weight, len(which), replacement=True, generator=generator).to(x.device)
        direction = normalize(inputs[drawn], dim=-1)
        alive = ~dead[block]
        norms = params["W_enc"][block].norm(dim=0)
        scale = 0.2 * (norms[alive].mean() if alive.any() else norms.mean())
        params["W_dec"][block, which] = direction
        params["W_enc"][block, :, which] = (scale * direction).mT
        params["b_enc"][block, which] = 0.0
        for each in moments:
            each["W_dec"][block, which] = 0.0
            each["W_enc"][block, :, which] = 0.0
            each["b_enc"][block, which] = 0.0
