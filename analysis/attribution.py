"""Direct feature attribution (DFA) by source position, exact for one attention head.

A feature's pre-activation at destination q is a sum over source positions s, because z is:

    pre[q] = sum_s A[q, s] (v[s] - b_V) . w  +  b_V . w + b_enc,     w = W_enc[h, :, f]

The attention row sums to 1, so b_V adds a constant wherever a head looks: it is kept out of the
sources, or BOS, on which heads rest, would be credited for a bias. The method is that of Kissane et
al. 2024 (arXiv:2406.17759), where a dense SAE makes it a sum over heads as well.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trainer.block_diag import BlockDiagSAE

if TYPE_CHECKING:  # it imports transformer_lens, for which pages that run no prompt should not wait
    from trainer.model.lm import Layer


class Slot(NamedTuple):
    """An exclusive kind of source."""

    words: str
    """in the description of a feature"""
    definition: str
    """of a source s, read at q"""


# In order of precedence: of the kinds that apply to a source, the first counts.
SLOT_TABLE = {
    "bos": Slot("BOS", "the first position"),
    "self": Slot("this token", "the position itself"),
    "induction": Slot("after an earlier copy", "the token after an earlier copy of this one"),
    "duplicate": Slot("an earlier copy", "an earlier copy of this token"),
    "previous": Slot("previous token", "the token before"),
    "local": Slot("2 to 5 back", "2 to 5 tokens back"),
    "other": Slot("elsewhere", "more than 5 tokens back"),
}
SLOTS = tuple(SLOT_TABLE)


class Chunk(NamedTuple):
    """Whole contexts as one attention layer sees them."""

    index: Int[Tensor, " context"]  # of each context in the text
    tokens: Int[Tensor, "context pos"]
    z: Float[Tensor, "context pos head d_head"]
    v: Float[Tensor, "context pos head d_head"]
    pattern: Float[Tensor, "context head query source"]
    slots: Int[Tensor, "context query source"]


class Firings(NamedTuple):
    """Activations above 0 of a chunk, in reading order."""

    context: Int[Tensor, " firing"]  # within the chunk
    position: Int[Tensor, " firing"]
    feature: Int[Tensor, " firing"]  # global id
    value: Float[Tensor, " firing"]

    @classmethod
    def of(cls, f: Float[Tensor, "context pos block feature"]) -> "Firings":
        """All of them."""
        flat = f.flatten(2)
        context, position, feature = flat.nonzero().unbind(1)
        return cls(context, position, feature, flat[context, position, feature])

    def where(self, keep: Bool[Tensor, " firing"] | Int[Tensor, " kept"]) -> "Firings":
        """Some of them, by a mask or by index."""
        return Firings(*(column[keep] for column in self))


class Reader:
    """An SAE and the layer it reads: which head gives what to which feature.

    In a block-diagonal SAE a feature is read by the head of its block; in a dense one by every head.

    Args:
        sae: for raw hook_z; it is moved to the layer's device.
    """

    def __init__(self, sae: BlockDiagSAE, layer: "Layer") -> None:
        self.sae, self.is_dense = sae.to(layer.device), sae.is_dense
        self.b_V: Float[Tensor, "head d_head"] = layer.b_V.float()
        self.W_enc: Float[Tensor, "head d_head feature"] = sae.W_enc.detach().reshape(
            *self.b_V.shape, sae.features_per_block
        )

    @torch.no_grad()
    def encode(self, chunk: Chunk, first: int = 1) -> Float[Tensor, "context pos block feature"]:
        """Feature activations, zero at positions before `first`: BOS is not part of what an SAE is for."""
        f = self.sae.encode(chunk.z.float())
        f[:, :first] = 0
        return f

    def reads(self, chunk: Chunk) -> Float[Tensor, "context head feature source"]:
        """(v[s] - b_V) . w: what a feature would read at each source if its head looked only there.

        The sources of one feature lie side by side in memory.
        """
        return self.W_enc.mT @ (chunk.v.float() - self.b_V).permute(0, 2, 3, 1)

    def attribute(
        self, chunk: Chunk, reads: Float[Tensor, "context head feature source"], firings: Firings
    ) -> Float[Tensor, "firing reader source"]:
        """A[q, s] (v[s] - b_V) . w of single firings: through the feature's own head, or all heads of a dense SAE.

        Args:
            reads: of this chunk.
        """
        context, query, feature, _ = firings
        if self.is_dense:
            return chunk.pattern[context, :, query] * reads[context, :, feature]
        head, index = feature // reads.shape[2], feature % reads.shape[2]
        return (chunk.pattern[context, head, query] * reads[context, head, index])[:, None]

    def constants(self) -> Float[Tensor, " feature"]:
        """b_V . w + b_enc: the part of every pre-activation that no source explains."""
        constants = torch.einsum("hd,hdf->hf", self.b_V, self.W_enc)
        if self.is_dense:
            constants = constants.sum(0, keepdim=True)
        return (constants + self.sae.b_enc.detach()).flatten()


def source_slots(tokens: Int[Tensor, " pos"]) -> Int[Tensor, "query source"]:
    """Index into SLOTS for every source of every query; -1 where the source lies in the future."""
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
    for name, holds in tests.items():  # the first of SLOT_TABLE comes last and stays
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
