"""What features write: the residual stream, and through the final norm and the unembedding the logits."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.block_diag import BlockDiagSAE

if TYPE_CHECKING:  # it imports transformer_lens, for which pages that run no prompt should not wait
    from trainer.model.lm import LanguageModel, Layer

N_LOGITS = 10  # tokens kept at either end
BINS = 40  # of the histogram of a feature's effects on all logits
_TILE = 512  # features whose logits are computed at a time: 100 MB with 49,152 tokens in the vocabulary


class LogitEffects(NamedTuple):
    """Direct effect of one unit of activation on the logits, per feature."""

    top_ids: Int[Tensor, "feature n"]
    top: Float[Tensor, "feature n"]
    bottom_ids: Int[Tensor, "feature n"]
    bottom: Float[Tensor, "feature n"]
    histogram: Int[Tensor, "feature bin"]  # from bottom[:, 0] to top[:, 0]


def head_of_features(sae: BlockDiagSAE, n_heads: int) -> tuple[Int[Tensor, " feature"], Float[Tensor, " feature"]]:
    """The head that each feature writes to, and the share of its squared decoder norm there.

    A block's features have their head with share 1; a feature of a dense SAE is attributed to the head in which its
    decoder row is longest.
    """
    if not sae.is_dense:
        return torch.arange(sae.d_sae) // sae.features_per_block, torch.ones(sae.d_sae)
    squared = sae.W_dec.reshape(sae.d_sae, n_heads, -1).pow(2).sum(-1).cpu()
    largest, head = squared.max(1)
    return head, largest / squared.sum(1).clamp_min(torch.finfo(squared.dtype).tiny)


@torch.no_grad()
def written(sae: BlockDiagSAE, W_O: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "feature d_model"]:
    """W_dec through `Layer.W_O` of its head: what one unit adds to the residual stream, times the output's scale."""
    blocks = W_O.float().reshape(sae.n_blocks, sae.width, -1)
    return (sae.W_dec @ blocks).flatten(0, 1)


@torch.no_grad()
def logit_effects(
    lm: "LanguageModel", directions: Float[Tensor, "feature d_model"], inverse_scale: float
) -> LogitEffects:
    """Direct effects of directions of the residual stream on the logits.

    The norms are linearised: they divide by the scales that they have on text (`inverse_scale`), and their weights are
    part of the directions and of the unembedding. b_U, which no feature changes, and a soft cap are left out.
    """
    parts = []
    for tile in directions.split(_TILE):
        logits = lm.unembed(tile.to(lm.device)).float() * inverse_scale
        top = logits.topk(N_LOGITS, dim=1)
        bottom = logits.topk(N_LOGITS, dim=1, largest=False)
        low, high = bottom.values[:, :1], top.values[:, :1]
        bins = ((logits - low) * (BINS / (high - low).clamp_min(1e-30))).long().clamp_(0, BINS - 1)
        histogram = torch.zeros(len(tile), BINS, device=logits.device)
        histogram.scatter_add_(1, bins, torch.ones_like(logits))
        parts.append(LogitEffects(top.indices, top.values, bottom.indices, bottom.values, histogram.int()))
    return LogitEffects(*(torch.cat(tiles).cpu() for tiles in zip(*parts, strict=True)))


def inverse_scale(layer: "Layer", contexts: Int[Tensor, "context pos"]) -> float:
    """`mean_inverse` of contexts that are read for it."""
    forward = layer.forward(contexts)
    return mean_inverse(layer.lm, forward.final, layer.output_scale(forward.resid_pre))


def mean_inverse(
    lm: "LanguageModel", final: Float[Tensor, "context pos d_model"], output_scale: Float[Tensor, "context pos 1"]
) -> float:
    """Mean over tokens but BOS of one over what norms divide by on the direct path from a head to the logits."""
    scale = lm.final_scale(final).double() * output_scale.double().to(final.device)
    return (1 / scale[:, 1:]).mean().item()
