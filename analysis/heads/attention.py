"""Where every head of a model looks: one pass over contexts, each layer run once, sums kept by context."""

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from analysis import attribution as dfa
from analysis.attention import row_sums
from analysis.attribution import Chunk
from analysis.corpus.heads import Copying, Reads, copying_of, most_attended, spread
from analysis.corpus.mean_pattern import MeanPattern
from analysis.corpus.passes import rounds
from trainer.kernels import workers
from trainer.model.lm import LanguageModel

CELLS = 32  # rows of a mean pattern: of 270 heads, patterns of 64 take 2 MB
_PAIRS = 256  # per head, of which the copying rank is taken: an unembedding each, for every head of the model


class Attention:
    """What all heads of a model attend to in some contexts, by context, so that errors can be clustered.

    Args:
        contexts: beginning with BOS.
        first_query: position of the first query that counts, at least 1.
        positions: of a context that mean patterns show, from BOS on.
    """

    def __init__(
        self, lm: LanguageModel, contexts: Int[Tensor, "context pos"], first_query: int, positions: int
    ) -> None:
        self.contexts, self.first_query = contexts, first_query
        self.vocabulary, self._place = contexts.unique(return_inverse=True)
        shape, n = (lm.n_layers, lm.n_heads), len(contexts)
        self.mass = torch.zeros(*shape, len(dfa.SLOTS), n, dtype=torch.float64)
        self.entropy, self.maximum, self.distance = torch.zeros(3, *shape, n, dtype=torch.float64)
        self.chance = torch.zeros(len(dfa.SLOTS), dtype=torch.float64)  # of attention that looks everywhere alike
        # Attention besides BOS, by the token that looks and by the token looked at: columns are of `vocabulary`.
        self.by_query, self.by_key = torch.zeros(2, *shape, len(self.vocabulary), dtype=torch.float64)
        self.patterns = [MeanPattern(lm.n_heads, positions, CELLS) for _ in range(lm.n_layers)]

    @property
    def n_queries(self) -> int:
        """Queries that count, of each context."""
        return self.contexts.shape[1] - self.first_query

    def add(self, layer: int, chunk: Chunk) -> None:
        """One layer's attention in some of the contexts."""
        rows = list(zip(chunk.pattern, chunk.slots, strict=True))
        sums = workers.each(lambda row: row_sums(*row, self.first_query), rows)
        for context, of_context in zip(chunk.ids.tolist(), sums, strict=True):
            mass, entropy, maximum, distance, by_query, by_key = (each.cpu().double() for each in of_context)
            place = self._place[context]
            self.mass[layer, :, :, context] = mass
            self.entropy[layer, :, context] = entropy
            self.maximum[layer, :, context] = maximum
            self.distance[layer, :, context] = distance
            self.by_query[layer].index_add_(1, place[self.first_query :], by_query)
            self.by_key[layer].index_add_(1, place[1:], by_key)
        self.patterns[layer].update([chunk])

    def add_chance(self, slots: Int[Tensor, "context query source"]) -> None:
        """What some of the contexts offer to attention that looks everywhere alike."""
        uniform = dfa.uniform_pattern(slots.shape[1])
        for of_context in slots:
            self.chance += dfa.mass_per_slot(uniform, of_context.cpu(), self.first_query)[0].double()


@torch.no_grad()
def attend(
    lm: LanguageModel,
    contexts: Int[Tensor, "context pos"],
    first_query: int,
    positions: int,
    fuzzy_from: float,
    with_copying: bool,
    what: str,
) -> tuple[Attention, list[list[Copying]]]:
    """One pass: the attention of all heads, and per layer and head the copying score, if asked for.

    Args:
        fuzzy_from: of `TokenKinds`.
        what: beside the progress bar.
    """
    found = Attention(lm, contexts, first_query, positions)
    n_contexts, length = contexts.shape
    reads: list[list[Reads]] = [[] for _ in range(lm.n_layers)]
    context, query = spread(n_contexts, length, _PAIRS)
    total = n_contexts * (length - 1) * lm.n_layers
    with tqdm(desc=what, total=total, unit="tok·layer", unit_scale=True, dynamic_ncols=True) as bar:
        for _, of_layers in rounds(lm, range(lm.n_layers), contexts, torch.arange(n_contexts), fuzzy_from):
            for layer, chunk in ((layer, chunk) for layer, chunks in of_layers for chunk in chunks):
                found.add(layer, chunk)
                if layer == 0:
                    found.add_chance(chunk.slots)
                if with_copying:
                    inside = (context >= chunk.ids[0]) & (context <= chunk.ids[-1])
                    reads[layer].append(most_attended(chunk, context[inside] - chunk.ids[0], query[inside]))
                bar.update(chunk.tokens[:, 1:].numel())
    if not with_copying:
        return found, []
    of_layers = tqdm(enumerate(reads), "Copying", lm.n_layers, unit="layer", dynamic_ncols=True)
    return found, [copying_of(lm.layer(layer), Reads.joined(parts)) for layer, parts in of_layers]
