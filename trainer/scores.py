"""The figures of an evaluation from what was measured of each context; docs/metrics.md defines them.

Every figure is a ratio of sums over contexts, and has its standard error clustered by context beside it as `<name>_se`.
None stands for what is not measurable: an error of one context, or a score whose denominator is not positive enough.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trainer import clustered
from trainer.block_diag import BlockDiagSAE
from trainer.clustered import ratio
from trainer.effects import Effects, measurable

_ENCODED_TOKENS = 1024  # at a time
_CONSTANT = 1e-12  # of its squared norm: less variance is rounding


@torch.no_grad()
def reconstruction(
    sae: BlockDiagSAE, z: Float[Tensor, "context pos head d_head"], mean: Float[Tensor, "head d_head"]
) -> dict[str, Any]:
    """Sparsity, squared error and shrinkage over tokens; z is raw hook_z, `mean` that over all of them.

    Norm ratio and bias are `l2_ratio` and `relative_reconstruction_bias` of SAELens' evals; the bias is equation 10 of
    Rajamanoharan et al. 2024 (arXiv:2404.16014).
    """
    n_features = sae.features_per_block
    fired = torch.zeros(sae.n_blocks, n_features, dtype=torch.int64, device=z.device)
    histogram = torch.zeros(sae.n_blocks, n_features + 1, dtype=torch.int64, device=z.device)
    parts = []
    for part in z.split(max(1, _ENCODED_TOKENS // z.shape[1])):
        x = part.float().flatten(0, 1)  # [token, head, d_head]
        f = sae.encode(x)
        x_hat = sae.decode(f).reshape(x.shape)
        active = f > 0
        fired += active.sum(0)
        histogram.scatter_add_(1, active.sum(-1).T, torch.ones_like(active[..., 0].T, dtype=torch.int64))
        of_head = torch.stack(
            [(x_hat - x).pow(2), (x - mean).pow(2), x.pow(2), x_hat.pow(2), x * x_hat]
        ).sum(-1).double()  # fmt: skip
        norms = of_head[[2, 3]].sum(-1, keepdim=True)  # of all heads together
        ratios = [_norm_ratio(*of_head[[2, 3]]), _norm_ratio(*norms)]
        of_token = torch.cat([*of_head, *ratios, active.sum(-1).double()], dim=-1)
        parts.append(of_token.unflatten(0, (len(part), -1)).sum(1))
    sums = torch.cat(parts).T  # [figure and head, context]
    heads = z.shape[2]
    *sums, ratio_of_head, ratio_of_all, l0 = sums.split([heads] * 6 + [1, sae.n_blocks])
    error, deviation, square, written, product = sums
    n = torch.tensor([float(z.shape[1])], device=z.device)
    varies = (deviation.sum(-1) > _CONSTANT * square.sum(-1))[:, None]
    silent = (fired == 0).double().mean(-1)
    longest = int(histogram.sum(0).nonzero().max()) + 1
    return {
        **_named("L0", *ratio(l0.sum(0), n)), **_named("L0_per_head", *ratio(l0, n)),
        "L0_histogram_per_head": histogram[:, :longest].tolist(),
        **_named("MSE", *ratio(error.sum(0), n)), **_named("MSE_per_head", *ratio(error, n)),
        **_named("FVU", *ratio(error.sum(0), deviation.sum(0))),
        **_named("FVU_per_head", *ratio(error, deviation.where(varies, 0))),  # of a constant head: none
        **_named("norm_ratio", *ratio(ratio_of_all[0], n)), **_named("norm_ratio_per_head", *ratio(ratio_of_head, n)),
        **_named("bias", *ratio(written.sum(0), product.sum(0))), **_named("bias_per_head", *ratio(written, product)),
        "silent_fraction": silent.mean().item(),
        "silent_fraction_per_head": silent.tolist(),
    }  # fmt: skip


def _norm_ratio(square: Float[Tensor, "token head"], written: Float[Tensor, "token head"]) -> Tensor:
    """‖ẑ‖/‖z‖; of a z that is nothing the norm of ẑ."""
    return written.sqrt() / square.sqrt().where(square > 1e-8, 1)


def prediction(of_text: Effects, index: int) -> dict[str, Any]:
    """CE and KL figures of the `index`-th SAE; errors of CE are of differences to clean, context by context."""
    clean, zero, mean = of_text.clean, of_text.zero, of_text.mean
    ce, kl = (each[index] for each in of_text.saes)
    figures = _named("CE_clean", *clustered.mean(clean))
    for name, loss in (("sae", ce), ("zero", zero.ce), ("mean", mean.ce)):
        figures |= _paired(f"CE_{name}", loss, clean)
    for name, divergence in (("sae", kl), ("zero", zero.kl)):
        figures |= _named(f"KL_{name}", *clustered.mean(divergence))
    figures |= _score("CE_score", ce - clean, zero.ce - clean) | _score("KL_score", kl, zero.kl)
    if not of_text.zero_heads.ce.numel():
        return figures
    (ce, kl), zero = (each[index] for each in of_text.sae_heads), of_text.zero_heads
    clean = clean[: ce.shape[1]].expand_as(ce)
    figures |= {"n_tokens_per_head": clean[0].numel(), "n_contexts_per_head": clean.shape[1]}
    figures["CE_clean_per_head"] = _plain(clustered.mean(clean)[0])
    figures |= _paired("CE_sae_per_head", ce, clean) | _paired("CE_zero_per_head", zero.ce, clean)
    figures |= _named("KL_sae_per_head", *clustered.mean(kl)) | _named("KL_zero_per_head", *clustered.mean(zero.kl))
    figures |= _score("CE_score_per_head", ce - clean, zero.ce - clean)
    return figures | _score("KL_score_per_head", kl, zero.kl)


def _score(
    name: str, damage: Float[Tensor, "*head context token"], ablation: Float[Tensor, "*head context token"]
) -> dict[str, Any]:
    """1 - mean(damage) / mean(ablation), where ablation is `measurable`."""
    share, se = ratio(damage.double().sum(-1), ablation.double().sum(-1))
    known = measurable(ablation)
    return _named(name, (1 - share).where(known, torch.nan), se.where(known, torch.nan))


def _paired(name: str, loss: Float[Tensor, "*head context token"], clean: Tensor) -> dict[str, Any]:
    """A mean loss with the error of its difference to clean: texts differ more than models."""
    return _named(name, clustered.mean(loss)[0], clustered.mean(loss.double() - clean)[1])


def _named(name: str, value: Float[Tensor, "*head"], se: Float[Tensor, "*head"]) -> dict[str, Any]:
    return {name: _plain(value), f"{name}_se": _plain(se)}


def _plain(values: Float[Tensor, "*head"]) -> Any:
    """As JSON has it: None for nan."""
    return [_plain(each) for each in values] if values.dim() else None if values.isnan() else values.item()
