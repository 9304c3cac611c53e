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

from analysis.tokens import TOKEN_CLASSES, ends_sentence, is_transparent, may_start_sentence, token_class
from trainer.block_diag import BlockDiagSAE

if TYPE_CHECKING:  # it imports transformer_lens, for which pages that run no prompt should not wait
    from trainer.model.lm import LanguageModel, Layer

_NULL_TOKENS = 2048  # different ones of a text, of whose pairs the null distribution of similarity is made
_NULL_SHARE = 1e-3  # of them called similar


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
    "fuzzy_induction": Slot("after a similar token", "the token after an earlier one whose embedding is similar"),
    "fuzzy_duplicate": Slot("a similar token", "an earlier token whose embedding is similar"),
    "sentence_start": Slot("start of a sentence", "the first word of a sentence, not in lower case"),
    "punctuation": Slot("punctuation", TOKEN_CLASSES["punctuation"]),
    "newline": Slot("a line break", TOKEN_CLASSES["newline"]),
    "digit": Slot("a number", TOKEN_CLASSES["digit"]),
    "capitalised": Slot("a capitalised word", TOKEN_CLASSES["capitalised"]),
    "function": Slot("a function word", TOKEN_CLASSES["function"]),
    "content": Slot("a content word", TOKEN_CLASSES["content"]),
    "local": Slot("2 to 5 back", "2 to 5 tokens back, none of the above"),
    "other": Slot("elsewhere", "more than 5 tokens back, none of the above"),
}
SLOTS = tuple(SLOT_TABLE)
RESIDUAL = ("local", "other")  # what is left: two features that read it need not agree in anything


class Chunk(NamedTuple):
    """Whole contexts as one attention layer sees them."""

    ids: Int[Tensor, " context"]  # place of each context in the text
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


class TokenKinds:
    """What source slots need to know of a language model's tokens: their classes, and which are similar.

    Args:
        tokens: those that will be asked for.
        fuzzy_from: cosine of embeddings from which two tokens are similar (`similarity_threshold`); above 1 none are.
    """

    def __init__(self, lm: "LanguageModel", tokens: Int[Tensor, "..."], fuzzy_from: float = 2.0) -> None:
        self._lm, self._fuzzy_from = lm, fuzzy_from
        ids = tokens.unique().cpu()
        texts = lm.token_strings(ids.tolist())
        self._class = torch.full((lm.d_vocab,), -1)
        self._class[ids] = torch.tensor([SLOTS.index(name) if (name := token_class(t)) else -1 for t in texts])
        self._is: dict[str, Bool[Tensor, " vocab"]] = {}
        for name, holds in (("end", ends_sentence), ("transparent", is_transparent), ("start", may_start_sentence)):
            self._is[name] = torch.zeros(lm.d_vocab, dtype=torch.bool)
            self._is[name][ids] = torch.tensor([holds(text) for text in texts])

    def classes(self, tokens: Int[Tensor, " pos"]) -> Int[Tensor, " pos"]:
        """Index into SLOTS of each token's class; -1 where it has none."""
        ends, transparent, starts = (self._is[name][tokens] for name in ("end", "transparent", "start"))
        # Place of the last token that is not transparent, up to each; BOS ends nothing, for texts are cut anywhere.
        last = torch.cummax(torch.where(transparent, -1, torch.arange(len(tokens))), 0).values
        before = torch.cat([torch.tensor([-1]), last[:-1]])
        after_end = (before > 0) & ends[before.clamp_min(0)]
        return torch.where(starts & after_end, SLOTS.index("sentence_start"), self._class[tokens])

    def similar(self, tokens: Int[Tensor, " pos"]) -> Bool[Tensor, "pos pos"]:
        """Which tokens are similar to which."""
        if self._fuzzy_from > 1:
            return torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        unit = _unit_embeddings(self._lm, tokens)
        return (unit @ unit.T >= self._fuzzy_from).cpu()


def similarity_threshold(lm: "LanguageModel", tokens: Int[Tensor, "..."], seed: int = 0) -> float:
    """Cosine of embeddings that one of a thousand random pairs of different tokens of a text reaches.

    Of tokens of the text, each once: the vocabulary's rare tokens are alike without meaning the same.
    """
    ids = tokens.unique().cpu()
    picks = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:_NULL_TOKENS]]
    if len(picks) < 2:
        return 2.0
    unit = _unit_embeddings(lm, picks)
    n = len(picks)
    null = (unit @ unit.T)[torch.triu(torch.ones(n, n, dtype=torch.bool, device=unit.device), 1)]
    return null.kthvalue(max(1, len(null) - int(len(null) * _NULL_SHARE))).values.item()


def _unit_embeddings(lm: "LanguageModel", tokens: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
    return torch.nn.functional.normalize(lm.embeddings(tokens).float(), dim=1)


def source_slots(tokens: Int[Tensor, " pos"], kinds: TokenKinds) -> Int[Tensor, "query source"]:
    """Index into SLOTS for every source of every query; -1 where the source lies in the future."""
    n = len(tokens)
    q, s = torch.arange(n)[:, None], torch.arange(n)[None, :]
    tokens = tokens.cpu()
    before = torch.cat([torch.full((1,), -1), tokens[:-1]])  # token[s-1]; nothing precedes BOS
    similar = kinds.similar(tokens)  # [query, source]
    classes = kinds.classes(tokens).expand(n, n)
    near = (q - s >= 2) & (q - s <= 5)
    slots = torch.where(near, SLOTS.index("local"), SLOTS.index("other"))
    slots = torch.where(classes >= 0, classes, slots)
    tests = {
        "fuzzy_duplicate": similar,
        "fuzzy_induction": torch.nn.functional.pad(similar, (1, -1)),
        "previous": q - s == 1,
        "duplicate": tokens[None, :] == tokens[:, None],
        "induction": before[None, :] == tokens[:, None],
        "self": q == s,
        "bos": (s == 0).expand(n, n),
    }
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


def uniform_pattern(n: int) -> Float[Tensor, "1 query source"]:
    """Attention that looks everywhere alike: what a head has on each slot by chance."""
    return torch.ones(1, n, n).tril() / torch.arange(1, n + 1)[:, None]


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
