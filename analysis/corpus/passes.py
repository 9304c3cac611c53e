"""The two passes over the text: statistics of all features at once, then what belongs to their examples.

The language model runs up to the layer's attention and no further, once for all SAEs of the layer.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis import attribution as dfa
from analysis.corpus.running import Chunk, FeatureStatistics, Firings, Sources
from trainer.block_diag import BlockDiagSAE
from trainer.evaluate import repeated_tokens
from trainer.model.lm import Layer

_LM_TOKENS = 4096  # of one forward
_CHUNK_TOKENS = 1024  # encoded at a time: 100 MB of activations with 24,576 features
_SMALL = 0.01  # sources with less than this share of the largest |DFA|, and less attention, are left out of examples


def chunks(layer: Layer, contexts: Int[Tensor, "context pos"], index: Int[Tensor, " context"]) -> Iterator[list[Chunk]]:
    """The contexts named by `index`: one list of chunks a forward."""
    length = contexts.shape[1]
    for batch in index.split(max(1, _LM_TOKENS // length)):
        tokens = contexts[batch].to(layer.device)
        z, v, pattern = layer.attention(tokens)
        slots = torch.stack([dfa.source_slots(each) for each in tokens]).to(layer.device)
        parts = (batch, tokens, z, v, pattern.float(), slots)
        yield [Chunk(*each) for each in zip(*(p.split(max(1, _CHUNK_TOKENS // length)) for p in parts), strict=True)]


def first_pass(
    layer: Layer,
    contexts: Int[Tensor, "context pos"],
    start: int,
    statistics: list[FeatureStatistics],
    after_forward: Callable[[int], None],
) -> None:
    """Add the contexts from `start` on to the statistics; `after_forward` is told how many contexts are done."""
    for batch in chunks(layer, contexts, torch.arange(start, len(contexts))):
        for chunk in batch:
            for each in statistics:
                each.update(chunk)
        after_forward(int(batch[-1].index[-1]) + 1)


@torch.no_grad()
def sources_on_repeats(
    layer: Layer, saes: list[BlockDiagSAE], n_contexts: int, length: int, seed: int
) -> list[Sources]:
    """Where features and heads read from on random tokens repeated once, scored on the second half."""
    half = (length - 1) // 2
    tokens = repeated_tokens(layer.lm, n_contexts, half, seed)
    found = [Sources(sae.d_sae, layer.n_heads, None) for sae in saes]
    b_V = layer.b_V.float()
    for batch in chunks(layer, tokens, torch.arange(n_contexts)):
        for chunk in batch:
            for sae, sources in zip(saes, found, strict=True):
                reads = dfa.reads_by_feature(chunk.v.float(), b_V, dfa.head_encoders(sae, layer.n_heads, layer.d_head))
                f = sae.encode(chunk.z.float())
                f[:, : 1 + half] = 0
                sources.add_features(Firings.of(f), chunk, reads, sae.is_dense)
                sources.add_heads(chunk, reads, f > 0, 1 + half)
    return found


def choose_examples(statistics: FeatureStatistics, n_quantiles: int, length: int) -> pd.DataFrame:
    """The examples of every feature, one row each, sorted by feature.

    `top`: the contexts in which it fires most, by rank from 0. `quantile`: of firings drawn uniformly, those in the
    middle of `n_quantiles` equal groups by activation, strongest first; all that were drawn, where there are fewer.
    """
    parts = []
    for kind, largest in (("top", statistics.top), ("quantile", statistics.sample)):
        value = torch.where(largest.at >= 0, largest.value, -torch.inf)
        value, order = value.sort(stable=True, dim=1, descending=True)
        at = largest.at.gather(1, order)
        n = (at >= 0).sum(1)
        if kind == "quantile":
            middle = (torch.arange(n_quantiles) + 0.5) / n_quantiles * n[:, None]
            few = torch.arange(n_quantiles).expand_as(middle)
            picks = torch.where(n[:, None] > n_quantiles, middle.long(), few).clamp_max(value.shape[1] - 1)
            value, at = value.gather(1, picks), at.gather(1, picks)
            at = torch.where(torch.arange(n_quantiles) < n[:, None], at, -1)
            quantile = 1 - (picks + 0.5) / n[:, None].clamp_min(1)
        else:
            quantile = torch.full_like(value, torch.nan)
        feature, rank = (at >= 0).nonzero(as_tuple=True)
        parts.append(
            pd.DataFrame(
                {
                    "feature": feature.int().numpy(),
                    "kind": kind,
                    "rank": rank.short().numpy(),
                    "quantile": quantile[feature, rank].float().numpy(),
                    "context": (at[feature, rank] // length).int().numpy(),
                    "position": (at[feature, rank] % length).short().numpy(),
                    "activation": value[feature, rank].numpy(),
                }
            )
        )
    order = {"top": 0, "quantile": 1}
    table = pd.concat(parts)
    return table.sort_values(
        ["feature", "kind", "rank"], key=lambda c: c.map(order) if c.name == "kind" else c
    ).reset_index(drop=True)


class Strips:
    """What surrounds each example, as sparse rows: `example` is its row in `choose_examples`.

    Activations of its feature along the context; DFA and attention by source. Of a dense SAE the DFA is
    summed over heads and the attention is that of the head with the largest DFA.
    """

    def __init__(self, n_examples: int) -> None:
        self.head = torch.zeros(n_examples, dtype=torch.int16)
        self.dfa_sum = torch.zeros(n_examples)  # over all sources, also those left out
        self.active_example: list[Tensor] = []
        self.active_position: list[Tensor] = []
        self.active_value: list[Tensor] = []
        self.source_example: list[Tensor] = []
        self.source_position: list[Tensor] = []
        self.source_dfa: list[Tensor] = []
        self.source_attention: list[Tensor] = []

    def add(
        self,
        example: Int[Tensor, " example"],
        along: Float[Tensor, "example pos"],
        attribution: Float[Tensor, "example head source"],
        attention: Float[Tensor, "example head source"],
        head: Int[Tensor, " example"],
    ) -> None:
        """Add examples; `head` of a dense SAE is that of the row in `attention`."""
        by_source = attribution.sum(1)
        self.head[example] = head.short().cpu()
        self.dfa_sum[example] = by_source.sum(1).cpu()
        row, position = along.nonzero().cpu().unbind(1)
        self.active_example.append(example[row].int())
        self.active_position.append(position.short())
        self.active_value.append(along.cpu()[row, position].half())
        size = by_source.abs()
        kept = (size >= _SMALL * size.amax(1, keepdim=True)) & (size > 0) | (attention >= _SMALL)
        row, position = kept.nonzero().cpu().unbind(1)
        self.source_example.append(example[row].int())
        self.source_position.append(position.short())
        self.source_dfa.append(by_source.cpu()[row, position].half())
        self.source_attention.append(attention.cpu()[row, position].half())


@torch.no_grad()
def second_pass(
    layer: Layer,
    contexts: Int[Tensor, "context pos"],
    start: int,
    saes: list[BlockDiagSAE],
    examples: list[pd.DataFrame],
    strips: list[Strips],
    after_forward: Callable[[int], None],
) -> None:
    """Fill the strips from the contexts that hold an example, from the `start`-th of those on."""
    needed = example_contexts(examples)
    orders = [np.argsort(table["context"].to_numpy(), kind="stable") for table in examples]
    sorted_contexts = [table["context"].to_numpy()[order] for table, order in zip(examples, orders, strict=True)]
    b_V = layer.b_V.float()
    done = start
    for batch in chunks(layer, contexts, needed[start:]):
        for chunk in batch:
            first, last = int(chunk.index[0]), int(chunk.index[-1])
            for sae, table, order, held, strip in zip(saes, examples, orders, sorted_contexts, strips, strict=True):
                rows = order[np.searchsorted(held, first) : np.searchsorted(held, last, "right")]
                if len(rows):
                    _add_examples(sae, b_V, chunk, table.iloc[rows], torch.from_numpy(rows), strip)
            done += len(chunk.index)
        after_forward(done)


def example_contexts(examples: list[pd.DataFrame]) -> Int[Tensor, " context"]:
    """The contexts that hold an example, ascending."""
    return torch.from_numpy(np.unique(np.concatenate([table["context"] for table in examples]))).long()


def _add_examples(
    sae: BlockDiagSAE,
    b_V: Float[Tensor, "head d_head"],
    chunk: Chunk,
    table: pd.DataFrame,
    example: Int[Tensor, " example"],
    strips: Strips,
) -> None:
    dense = sae.is_dense
    f = sae.encode(chunk.z.float()).flatten(2)
    f[:, 0] = 0
    reads = dfa.reads_by_feature(chunk.v.float(), b_V, dfa.head_encoders(sae, *b_V.shape))
    context = torch.searchsorted(chunk.index, torch.from_numpy(table["context"].to_numpy(copy=True)).long())
    query, feature = (torch.from_numpy(table[name].to_numpy(copy=True)).long() for name in ("position", "feature"))
    for part in torch.arange(len(table)).split(_CHUNK_TOKENS):
        c, q, i = (each[part].to(f.device) for each in (context, query, feature))
        attribution = dfa.firing_sources(chunk.pattern, reads, c, q, i, dense)
        head = attribution.sum(2).argmax(1) if dense else i // sae.features_per_block
        strips.add(example[part], f[c, :, i], attribution, chunk.pattern[c, head, q], head)
