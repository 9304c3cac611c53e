"""The two passes over the text: statistics of all features at once, then what belongs to their examples.

The language model runs up to the last layer's attention and no further, once for all SAEs of all layers.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis import attribution as dfa
from analysis.attribution import Chunk, Firings, Reader, TokenKinds
from analysis.corpus.mean_pattern import MeanPattern
from analysis.corpus.running_statistics import FeatureStatistics, Sources, collect, firings_before
from trainer import ranks
from trainer.evaluate import repeated_tokens
from trainer.kernels import workers
from trainer.model.lm import LanguageModel, Layer

_LM_TOKENS = 4096  # of one forward
_CHUNK_TOKENS = 1024  # encoded at a time: 100 MB of activations with 24,576 features
SMALL = 0.01  # sources with less than this share of the largest |DFA|, and less attention, are left out of examples


def chunks(
    layer: Layer, contexts: Int[Tensor, "context pos"], index: Int[Tensor, " chosen"], fuzzy_from: float = 2.0
) -> Iterator[list[Chunk]]:
    """The contexts named by `index`: one list of chunks a forward.

    Args:
        fuzzy_from: of `TokenKinds`.
    """
    kinds = TokenKinds(layer.lm, contexts, fuzzy_from)
    for batch in _forwards(contexts, index):
        for _, of_layer in _chunks(layer.lm, [layer.index], contexts, batch, kinds):
            yield of_layer


def rounds(
    lm: LanguageModel,
    layers: Collection[int],
    contexts: Int[Tensor, "context pos"],
    index: Int[Tensor, " chosen"],
    fuzzy_from: float = 2.0,
) -> Iterator[tuple[Int[Tensor, " read"], Iterator[tuple[int, list[Chunk]]]]]:
    """As `chunks`, of several layers, and the forwards dealt to the processes in turns.

    A forward is the one of a single process, so that nothing in it rounds otherwise. In the last turn some have none.

    Returns:
        The contexts of a turn, and the own chunks of it, layer by layer: to be used up before the next turn.
    """
    kinds = TokenKinds(lm, contexts, fuzzy_from)
    forwards = _forwards(contexts, index)
    for first in range(0, len(forwards), ranks.size()):
        turn = forwards[first : first + ranks.size()]
        own = turn[ranks.index()] if ranks.index() < len(turn) else None
        nothing: Iterator[tuple[int, list[Chunk]]] = ((layer, []) for layer in sorted(layers))
        yield torch.cat(turn), nothing if own is None else _chunks(lm, layers, contexts, own, kinds)


def _forwards(contexts: Int[Tensor, "context pos"], index: Int[Tensor, " chosen"]) -> tuple[Int[Tensor, " batch"], ...]:
    return index.split(max(1, _LM_TOKENS // contexts.shape[1])) if len(index) else ()


def _chunks(
    lm: LanguageModel,
    layers: Collection[int],
    contexts: Int[Tensor, "context pos"],
    batch: Int[Tensor, " batch"],
    kinds: TokenKinds,
) -> Iterator[tuple[int, list[Chunk]]]:
    """Of one forward, layer by layer."""
    tokens = contexts[batch].to(lm.device)
    slots = torch.stack([dfa.source_slots(context, kinds) for context in tokens]).to(lm.device)
    for layer, (z, v, pattern) in lm.attentions(tokens, layers):
        parts = (batch, tokens, z, v, pattern.float(), slots)
        pieces = (part.split(max(1, _CHUNK_TOKENS // contexts.shape[1])) for part in parts)
        yield layer.index, [Chunk(*piece) for piece in zip(*pieces, strict=True)]


def feed(
    lm: LanguageModel,
    contexts: Int[Tensor, "context pos"],
    index: Int[Tensor, " chosen"],
    filled: Mapping[int, Sequence[Any]],
    fuzzy_from: float = 2.0,
) -> Iterator[Int[Tensor, " read"]]:
    """One pass: the contexts named by `index` go to everything in `filled`; yields those read by all in each turn.

    Args:
        filled: by layer, `FeatureStatistics`, `MeanPattern`, `Strips` or others with `update(batch)`.
    """
    for read, of_layers in rounds(lm, filled, contexts, index, fuzzy_from):
        for layer, batch in of_layers:
            for kept in filled[layer]:
                kept.update(batch)
        yield read


def sources_on_repeats(
    lm: LanguageModel,
    readers: dict[int, list[Reader]],
    n_contexts: int,
    length: int,
    seed: int,
    fuzzy_from: float = 2.0,
) -> dict[int, tuple[list[Sources], MeanPattern]]:
    """Where features and heads read from on random tokens repeated once, scored on the second half; what heads see.

    By layer, as the readers. The first process has what all saw. The pattern is of whole contexts: where a head attends
    by induction is seen in the second half alone.
    """
    first = 1 + (length - 1) // 2  # position of the second half
    tokens = repeated_tokens(lm, n_contexts, first - 1, seed)

    def empty() -> dict[int, list[Any]]:
        return {
            layer: [
                *(Sources(reader.sae.d_sae, lm.n_heads, None) for reader in of_layer),
                MeanPattern(lm.n_heads, tokens.shape[1]),
            ]
            for layer, of_layer in readers.items()
        }

    filled = empty()
    for _, of_layers in rounds(lm, readers, tokens, torch.arange(n_contexts), fuzzy_from):
        for layer, batch in of_layers:
            *sources, seen = filled[layer]
            seen.update(batch)
            for reader, of_sae in zip(readers[layer], sources, strict=True):
                _add_sources(reader, of_sae, batch, first)
    for layer, nothing in empty().items():
        collect(filled[layer], nothing)
    return {layer: (sources, seen) for layer, (*sources, seen) in filled.items()}


def _add_sources(reader: Reader, sources: Sources, batch: list[Chunk], first: int) -> None:
    encoded = [reader.encode(chunk, first) for chunk in batch]
    fired = [Firings.of(f) for f in encoded]
    earlier = firings_before(sources.firings, fired)
    for chunk, f, firings, before in zip(batch, encoded, fired, earlier, strict=True):
        reads = reader.reads(chunk)
        sources.add_features(reader, chunk, reads, firings, before)
        sources.add_heads(chunk, reads, f, first)


def choose_examples(statistics: FeatureStatistics, n_quantiles: int, length: int) -> pd.DataFrame:
    """The examples of every feature, one row each, sorted by feature.

    `top`: the contexts in which it fires most, by rank from 0. `quantile`: of firings drawn uniformly, those in the
    middle of `n_quantiles` equal groups by activation, strongest first; all that were drawn, where there are fewer.
    """
    parts = []
    for order, (kind, largest) in enumerate((("top", statistics.top), ("quantile", statistics.sample))):
        # [feature, place]: strongest first; at -1 where a feature has fewer
        value, place = torch.where(largest.at >= 0, largest.value, -torch.inf).sort(stable=True, dim=1, descending=True)
        at = largest.at.gather(1, place)
        n = (at >= 0).sum(1, keepdim=True)
        quantile = torch.full_like(value, torch.nan)
        if kind == "quantile":
            group = torch.arange(n_quantiles)
            middle = ((group + 0.5) / n_quantiles * n).long()  # [feature, group]: a place
            picks = torch.where(n > n_quantiles, middle, group).clamp_max(value.shape[1] - 1)
            value, at = value.gather(1, picks), at.gather(1, picks).masked_fill(group >= n, -1)
            quantile = 1 - (picks + 0.5) / n.clamp_min(1)
        feature, rank = (at >= 0).nonzero(as_tuple=True)
        columns = {
            "feature": feature.int(),
            "order": torch.full_like(feature, order),
            "rank": rank.short(),
            "quantile": quantile[feature, rank].float(),
            "context": (at[feature, rank] // length).int(),
            "position": (at[feature, rank] % length).short(),
            "activation": value[feature, rank],
        }
        parts.append(pd.DataFrame({name: column.numpy() for name, column in columns.items()}).assign(kind=kind))
    table = pd.concat(parts).sort_values(["feature", "order", "rank"], ignore_index=True)
    return table[["feature", "kind", "rank", "quantile", "context", "position", "activation"]]


class Strips:
    """What surrounds each example, as sparse rows: `example` is its row in `choose_examples`.

    Activations of its feature along the context; DFA and attention by source. Of a dense SAE the DFA is
    summed over heads and the attention is that of the head with the largest DFA.

    Args:
        examples: of `choose_examples`.
        small: share of the largest |DFA|, and attention, below which a source is left out.
    """

    def __init__(self, reader: Reader, examples: pd.DataFrame, small: float = SMALL) -> None:
        self._reader, self._small = reader, small
        columns = (torch.from_numpy(examples[name].to_numpy()).long() for name in ("context", "position", "feature"))
        self._context, self._position, self._feature = columns
        self._by_context = self._context.argsort(stable=True)
        self._held = self._context[self._by_context]
        self.head = torch.zeros(len(examples), dtype=torch.int16)
        self.dfa_sum = torch.zeros(len(examples))  # over all sources, also those left out
        self.active_example: list[Tensor] = []
        self.active_position: list[Tensor] = []
        self.active_value: list[Tensor] = []
        self.source_example: list[Tensor] = []
        self.source_position: list[Tensor] = []
        self.source_dfa: list[Tensor] = []
        self.source_attention: list[Tensor] = []

    @property
    def contexts(self) -> Int[Tensor, " context"]:
        """Those that hold an example, ascending."""
        return self._context.unique()

    @torch.no_grad()
    def update(self, batch: list[Chunk]) -> None:
        """Fill the strips of the examples in a forward, whose contexts ascend."""
        for strips in workers.each(self._surroundings, batch):
            for each in strips:
                self._add(*each)

    def absorb(self, other: "Strips") -> None:
        """Add the strips of examples in other contexts: here they are empty."""
        self.head += other.head
        self.dfa_sum += other.dfa_sum
        for name, value in vars(other).items():
            if isinstance(value, list):
                getattr(self, name).extend(value)

    @torch.no_grad()
    def _surroundings(self, chunk: Chunk) -> list[tuple[Tensor, ...]]:
        """Arguments of `_add`, of some examples in the chunk at a time."""
        first, end = torch.searchsorted(self._held, chunk.ids[[0, -1]] + torch.tensor([0, 1])).tolist()
        examples = self._by_context[first:end]
        if not len(examples):
            return []
        found: list[tuple[Tensor, ...]] = []
        f, reads = self._reader.encode(chunk).flatten(2), self._reader.reads(chunk)
        for example in examples.split(_CHUNK_TOKENS):
            context = torch.searchsorted(chunk.ids, self._context[example]).to(f.device)
            query, feature = (column[example].to(f.device) for column in (self._position, self._feature))
            firings = Firings(context, query, feature, f[context, query, feature])
            attribution = self._reader.attribute(chunk, reads, firings)  # [example, reader, source]
            if self._reader.is_dense:
                head = attribution.sum(2).argmax(1)
            else:
                head = feature // self._reader.sae.features_per_block
            strips = f[context, :, feature], attribution.sum(1), chunk.pattern[context, head, query]
            found.append((example, *strips, head))
        return found

    def _add(
        self,
        example: Int[Tensor, " example"],
        along: Float[Tensor, "example pos"],
        by_source: Float[Tensor, "example source"],
        attention: Float[Tensor, "example source"],
        head: Int[Tensor, " example"],
    ) -> None:
        self.head[example] = head.short().cpu()
        self.dfa_sum[example] = by_source.sum(1).cpu()
        row, position = along.nonzero().cpu().unbind(1)
        self.active_example.append(example[row].int())
        self.active_position.append(position.short())
        self.active_value.append(along.cpu()[row, position].half())
        size = by_source.abs()
        kept = (size >= self._small * size.amax(1, keepdim=True)) & (size > 0) | (attention >= self._small)
        row, position = kept.nonzero().cpu().unbind(1)
        self.source_example.append(example[row].int())
        self.source_position.append(position.short())
        self.source_dfa.append(by_source.cpu()[row, position].half())
        self.source_attention.append(attention.cpu()[row, position].half())
