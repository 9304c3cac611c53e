"""Direct feature attribution (DFA) by source position, exact for one attention head.

A feature's pre-activation at destination q is a sum over source positions s, because z is:

    pre[q] = sum_s A[q, s] (v[s] - b_V) . w  +  b_V . w + b_enc,     w = W_enc[h, :, f]

The attention row sums to 1, so b_V adds a constant wherever a head looks: it is kept out of the
sources, or BOS, on which heads rest, would be credited for a bias. The method is that of Kissane et
al. 2024 (arXiv:2406.17759), where a dense SAE makes it a sum over heads as well.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.block_diag import BlockDiagSAE

# Exclusive kinds of source, in order of precedence.
SLOTS = ("bos", "self", "induction", "duplicate", "previous", "local", "other")


def head_encoders(sae: BlockDiagSAE, n_heads: int, d_head: int) -> Float[Tensor, "head d_head feature"]:
    """The encoder as each head is read: a block's own features, or every feature of a dense SAE."""
    return sae.W_enc.reshape(n_heads, d_head, sae.features_per_block)


def reads_by_feature(
    v: Float[Tensor, "context source head d_head"],
    b_V: Float[Tensor, "head d_head"],
    W_enc: Float[Tensor, "head d_head feature"],
) -> Float[Tensor, "context head feature source"]:
    """(v[s] - b_V) . w: what a feature would read at each source if its head looked only there.

    The sources of one feature lie side by side in memory.
    """
    return W_enc.mT @ (v - b_V).permute(0, 2, 3, 1)


def firing_sources(
    pattern: Float[Tensor, "context head query source"],
    reads: Float[Tensor, "context head feature source"],
    context: Int[Tensor, " firing"],
    query: Int[Tensor, " firing"],
    feature: Int[Tensor, " firing"],
    dense: bool,
) -> Float[Tensor, "firing head source"]:
    """A[q, s] (v[s] - b_V) . w of single firings: of the feature's own head, or of all heads of a dense SAE.

    Args:
        reads: of `reads_by_feature`.
        feature: global feature id.
    """
    if dense:
        return pattern[context, :, query] * reads[context, :, feature]
    head, index = feature // reads.shape[2], feature % reads.shape[2]
    return (pattern[context, head, query] * reads[context, head, index])[:, None]


def constants(
    b_V: Float[Tensor, "head d_head"], W_enc: Float[Tensor, "head d_head feature"], b_enc: Float[Tensor, "head feature"]
) -> Float[Tensor, "head feature"]:
    """b_V . w + b_enc: the part of every pre-activation that no source explains (one block per head)."""
    return torch.einsum("hd,hdf->hf", b_V, W_enc) + b_enc


def source_slots(tokens: Int[Tensor, " pos"]) -> Int[Tensor, "query source"]:
    """Index into SLOTS for every source of every query; -1 where the source lies in the future.

    Of the kinds that apply, the first in SLOTS counts: bos (s = 0), self (s = q), induction
    (token[s-1] = token[q]), duplicate (token[s] = token[q]), previous (s = q-1), local (2 to 5 back).
    """
    n = len(tokens)
    q, s = torch.arange(n)[:, None], torch.arange(n)[None, :]
    tokens = tokens.cpu()
    before = torch.cat([torch.full((1,), -1), tokens[:-1]])  # token[s-1]; nothing precedes BOS
    tests = {
        "local": (q - s >= 2) & (q - s <= 5),
        "previous": q - s == 1,
        "duplicate": tokens[None, :] == tokens[:, None],
        "induction": before[None, :] == tokens[:, None],
        "self": q == s,
        "bos": (s == 0).expand(n, n),
    }
    slots = torch.full((n, n), SLOTS.index("other"))
    for name, holds in tests.items():  # later ones take precedence
        slots[holds] = SLOTS.index(name)
    return slots.masked_fill(s > q, -1)


def mass_per_slot(
    weights: Float[Tensor, "head query source"], slots: Int[Tensor, "query source"], first_query: int = 1
) -> Float[Tensor, "head slot"]:
    """Sum of weights (attention, or positive DFA) on each slot over queries from `first_query` on.

    Position 0 is BOS, which sees only itself.
    """
    flat = slots[first_query:].flatten().to(weights.device)
    valid = flat >= 0
    mass = torch.zeros(len(weights), len(SLOTS), device=weights.device)
    return mass.index_add_(1, flat[valid], weights[:, first_query:].flatten(1)[:, valid])


def shares(mass: Float[Tensor, "*rows slot"]) -> Float[Tensor, "*rows slot"]:
    """Mass as shares of its sum; zeros where there is none."""
    return mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)


def positive_mass(
    pattern: Float[Tensor, "head query source"],
    feature_reads: Float[Tensor, "head source feature"],
    active: Float[Tensor, "query head feature"],
) -> Float[Tensor, "head query source"]:
    """Sum over the features active at q of max(0, DFA[q, s]).

    Attention is never negative, so max(0, A r) = A max(0, r) and the sum over features is a matmul.
    """
    return pattern * torch.einsum("qhf,hsf->hqs", active, feature_reads.relu())
