"""Running statistics of every feature of one SAE over a stream of tokens, in memory that does not grow with it.

All that is kept is tensors, so that an interrupted pass goes on from `state`. Where several processes share a text,
each sees some of its contexts, in their order; in the end the first one has what it would have, had it seen all
(`collect`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis import attribution as dfa
from analysis.attention import RowSums, row_sums
from analysis.attribution import Chunk, Firings, Reader
from trainer import ranks
from trainer.kernels import workers

BINS = 64  # of an activation histogram
SAMPLE = 64  # firings of a feature drawn uniformly, from which its quantile examples are taken
DFA_FIRINGS = 1024  # of a feature, after which its sources are no longer tallied: shares are known to 1.6 %
HEAD_TOKENS = 16_384  # tokens over which attention and DFA of whole heads are summed
COFIRING_PAIRS = 16_000_000  # (token, feature) pairs kept for co-firing, from the first tokens on
_TILE = 2**22  # (firing, source) pairs attributed at a time
_UNSET = -1000  # exponent of a histogram that holds nothing


class Seen(NamedTuple):
    """A chunk and what an SAE makes of it."""

    chunk: Chunk
    f: Float[Tensor, "context pos block feature"]
    firings: Firings
    reads: Float[Tensor, "context head feature source"]


class FeatureStatistics:
    """What all features of one SAE did so far.

    Args:
        d_vocab: of the language model.
        n_top: contexts kept of each feature in which it fires most.
        has_pairs: whether co-firing is kept, of the first tokens.
    """

    def __init__(self, reader: Reader, d_vocab: int, n_top: int, has_pairs: bool = True) -> None:
        self._reader, self._n_cofiring = reader, COFIRING_PAIRS if has_pairs else 0
        n_heads, d_sae = len(reader.b_V), reader.sae.d_sae
        self.n_tokens = torch.tensor(0)
        self.firings = torch.zeros(d_sae, dtype=torch.int64)
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        self.maximum = torch.zeros(d_sae)
        self.histogram = torch.zeros(d_sae, BINS, dtype=torch.int64)
        self.exponent = torch.full((d_sae,), _UNSET, dtype=torch.int32)  # the histogram covers 0 to 2**exponent
        self.top = Largest(d_sae, n_top)
        self.sample = Largest(d_sae, SAMPLE)
        self.fires_on = Tally(d_vocab)
        self.sources = Sources(d_sae, n_heads, d_vocab)
        self.l0 = torch.zeros(reader.sae.n_blocks, dtype=torch.float64)
        self.error = torch.zeros(n_heads, dtype=torch.float64)
        self.z_sum = torch.zeros(reader.b_V.shape, dtype=torch.float64)
        self.z_squared = torch.zeros(n_heads, dtype=torch.float64)
        self.cofiring = Cofiring()

    @torch.no_grad()
    def update(self, batch: list[Chunk]) -> None:
        """Add a forward, of a text that is read from its beginning on; BOS positions count nowhere.

        All processes call it together: what is kept of the first firings and tokens of a text alone, is kept of those
        that are the first of all.
        """
        seen = workers.each(self._see, batch)
        earlier = firings_before(self.firings, [each.firings for each in seen])

        def add(what: Callable[[Seen, Tensor], None]) -> None:
            for each, before in zip(seen, earlier, strict=True):
                what(each, before)

        # Side by side what shares nothing, each in the order of the text: so no sum is rounded otherwise.
        workers.each(add, (self._add_sources, self._add_heads, self._add_activations, self._add_examples))

    def absorb(self, other: "FeatureStatistics") -> None:
        """Add what another saw of other contexts."""
        self._widen(other.exponent)
        other._widen(self.exponent)
        self.maximum = torch.maximum(self.maximum, other.maximum)
        for name in ("n_tokens", "firings", "total", "histogram", "l0", "error", "z_sum", "z_squared"):
            getattr(self, name).add_(getattr(other, name))
        for name in ("top", "sample", "fires_on", "sources", "cofiring"):
            getattr(self, name).absorb(getattr(other, name))

    def deviation(self) -> Float[Tensor, " head"]:
        """Squared deviation of z from its mean, summed over tokens."""
        return self.z_squared - self.z_sum.pow(2).sum(-1) / self.n_tokens

    def _see(self, chunk: Chunk) -> Seen:
        f = self._reader.encode(chunk)
        return Seen(chunk, f, Firings.of(f), self._reader.reads(chunk))

    def _add_sources(self, seen: Seen, before: Int[Tensor, " feature"]) -> None:
        self.sources.add_features(self._reader, seen.chunk, seen.reads, seen.firings, before)

    def _add_heads(self, seen: Seen, before: Int[Tensor, " feature"]) -> None:
        if int(seen.chunk.ids[0]) * (seen.chunk.tokens.shape[1] - 1) < HEAD_TOKENS:
            self.sources.add_heads(seen.chunk, seen.reads, seen.f, 1)

    @torch.no_grad()  # a thread has its own
    def _add_activations(self, seen: Seen, before: Int[Tensor, " feature"]) -> None:
        chunk, f, firings, _ = seen
        self.n_tokens += chunk.tokens[:, 1:].numel()
        z = chunk.z[:, 1:].float()
        self.error += (z - self._reader.sae.decode(f[:, 1:]).view_as(z)).pow(2).sum(-1).double().sum((0, 1)).cpu()
        self.z_sum += z.double().sum((0, 1)).cpu()
        self.z_squared += z.pow(2).sum(-1).double().sum((0, 1)).cpu()
        if before.sum() < self._n_cofiring:
            self.cofiring.add(firings, chunk)
        self.fires_on.add(firings.feature, chunk.tokens[firings.context, firings.position])
        feature, value = firings.feature.cpu(), firings.value.cpu()
        count = torch.bincount(feature, minlength=len(self.firings))
        largest = torch.zeros_like(self.maximum).scatter_reduce_(0, feature, value, "amax")
        self._widen(torch.where(largest > 0, torch.frexp(largest).exponent, _UNSET))  # largest < 2**exponent
        self.total.index_add_(0, feature, value.double())
        self.maximum = torch.maximum(self.maximum, largest)
        bins = torch.ldexp(value, -self.exponent[feature]).mul_(BINS).long()
        binned = torch.bincount(feature * BINS + bins, minlength=self.histogram.numel())
        self.histogram += binned.view_as(self.histogram)
        self.firings += count
        self.l0 += count.view(len(self.l0), -1).sum(1)

    def _widen(self, needed: Int[Tensor, " feature"]) -> None:
        """Double the range of histograms, merging their bins in pairs, until it reaches 2**needed.

        So 64 equal bins are exact whatever the range turns out to be; 32 bins for each of 24 octaves, from which the
        same could be made at the end, would take 12 times the memory.
        """
        wider = torch.maximum(needed, self.exponent)
        missing = torch.where(self.firings > 0, wider - self.exponent, 0)
        while (rows := missing > 0).any():
            merged = self.histogram[rows].view(-1, BINS // 2, 2).sum(-1)
            self.histogram[rows] = torch.nn.functional.pad(merged, (0, BINS // 2))
            missing -= rows.int()
        self.exponent = wider

    def _add_examples(self, seen: Seen, before: Int[Tensor, " feature"]) -> None:
        chunk, _, firings, _ = seen
        length = chunk.tokens.shape[1]
        at = chunk.ids.to(firings.context.device)[firings.context] * length + firings.position
        feature, value, at = firings.feature.cpu(), firings.value.cpu(), at.cpu()
        # One example a context, its strongest: neighbouring tokens would otherwise fill the list.
        good = value > self.top.key[feature, -1]
        best = _strongest_of_group(feature[good] * len(chunk.tokens) + firings.context.cpu()[good], value[good])
        self.top.add(feature[good][best], value[good][best], value[good][best], at[good][best])
        self.sample.add(feature, _random(at, feature), value, at)


class Largest:
    """Of each row the n entries with the largest keys, in descending order; of equal ones the earlier."""

    def __init__(self, n_rows: int, n: int) -> None:
        self.key = torch.full((n_rows, n), -torch.inf)
        self.value = torch.zeros(n_rows, n)
        self.at = torch.full((n_rows, n), -1)  # token in the text: context * length + position

    def add(
        self,
        row: Int[Tensor, " entry"],
        key: Float[Tensor, " entry"],
        value: Float[Tensor, " entry"],
        at: Int[Tensor, " entry"],
    ) -> None:
        """Offer entries; those of one row must come in the order of `at`."""
        good = key > self.key[row, -1]
        row, key, value, at = row[good], key[good], value[good], at[good]
        if not len(row):
            return
        n = self.key.shape[1]
        # Of the entries offered to a row its n largest: `rank` is their place among them.
        order = key.argsort(descending=True, stable=True)
        by_row, rank = _ranks(row[order])
        order, rank = order[by_row][rank < n], rank[rank < n]
        rows, place = row[order].unique(return_inverse=True)  # entry -> its line in the tables [row offered to, n]
        offered = torch.full((len(rows), n), -torch.inf)
        offered[place, rank] = key[order]
        # [row offered to, 2 n]: what is kept stands first, so that of equal keys it stays.
        merged = torch.cat([self.key[rows], offered], 1).sort(stable=True, dim=1, descending=True)
        self.key[rows] = merged.values[:, :n]
        for kept, new in ((self.value, value), (self.at, at)):
            offered = torch.full((len(rows), n), -1, dtype=kept.dtype)
            offered[place, rank] = new[order]
            kept[rows] = torch.cat([kept[rows], offered], 1).gather(1, merged.indices[:, :n])

    def absorb(self, other: "Largest") -> None:
        """Keep the largest of both."""
        both = {name: torch.cat([getattr(self, name), getattr(other, name)], 1) for name in ("at", "key", "value")}
        by_place = both["at"].argsort(1)  # of equal keys the earlier stays
        order = by_place.gather(1, both["key"].gather(1, by_place).argsort(dim=1, descending=True, stable=True))
        for name, values in both.items():
            setattr(self, name, values.gather(1, order[:, : self.key.shape[1]]))


class Tally:
    """Counts of (feature, token) pairs: exact up to `capacity` distinct ones, then too low by at most `floor`.

    When they overflow, the half with the lowest counts is dropped (after Manku and Motwani's lossy counting, 2002).
    """

    def __init__(self, d_vocab: int, capacity: int = 8_000_000) -> None:
        self._d_vocab, self._capacity = d_vocab, capacity
        self.floor = torch.tensor(0)
        self.keys = torch.empty(0, dtype=torch.int64)
        self.counts = torch.empty(0, dtype=torch.int64)
        self.pending = torch.empty(0, dtype=torch.int64)

    def add(self, feature: Int[Tensor, " firing"], token: Int[Tensor, " firing"]) -> None:
        """Count pairs."""
        self.pending = torch.cat([self.pending, (feature * self._d_vocab + token).cpu()])
        if len(self.pending) > max(2**20, len(self.keys) // 4):  # sorting everything for every chunk would be slow
            self._merge()

    def _merge(self) -> None:
        keys, counts = self.pending.unique(return_counts=True)
        self.pending = self.pending[:0]
        self._add(keys, counts)

    def _add(self, keys: Int[Tensor, " pair"], counts: Int[Tensor, " pair"]) -> None:
        self.keys, place = torch.cat([self.keys, keys]).unique(return_inverse=True)
        self.counts = torch.zeros_like(self.keys).index_add_(0, place, torch.cat([self.counts, counts]))
        if len(self.keys) > self._capacity:
            lower = self.counts.kthvalue(len(self.counts) - self._capacity // 2).values
            self.floor += lower
            kept = self.counts > lower
            self.keys, self.counts = self.keys[kept], self.counts[kept]

    def absorb(self, other: "Tally") -> None:
        """Add the counts of another; by as much as both are too low, they are together."""
        other._merge()
        self._merge()
        self._add(other.keys, other.counts)
        self.floor += other.floor

    def pairs(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Feature, token and count of every pair, by feature and token."""
        self._merge()
        return self.keys // self._d_vocab, self.keys % self._d_vocab, self.counts

    def top(self, n_features: int, n: int) -> tuple[Int[Tensor, "feature n"], Int[Tensor, "feature n"]]:
        """The most counted tokens of each feature and their counts; -1 and 0 where there are fewer."""
        self._merge()
        order = self.counts.argsort(descending=True, stable=True)
        by_feature, rank = _ranks(self.keys[order] // self._d_vocab)
        order, kept = order[by_feature], rank < n
        order, rank = order[kept], rank[kept]
        feature = self.keys[order] // self._d_vocab
        ids, counts = torch.full((n_features, n), -1), torch.zeros(n_features, n, dtype=torch.int64)
        ids[feature, rank] = self.keys[order] % self._d_vocab
        counts[feature, rank] = self.counts[order]
        return ids, counts


class Sources:
    """Where features and heads read from: their positive DFA, and their attention, by source slot.

    Args:
        d_vocab: of the tokens read, which are counted too; None where they have no meaning (random tokens).
    """

    def __init__(self, d_sae: int, n_heads: int, d_vocab: int | None) -> None:
        slots = len(dfa.SLOTS)
        self.firings = torch.zeros(d_sae, dtype=torch.int64)
        self.mass = torch.zeros(d_sae, slots, dtype=torch.float64)
        self.head_tokens = torch.tensor(0)
        self.head_attention = torch.zeros(n_heads, slots, dtype=torch.float64)
        self.head_dfa = torch.zeros(n_heads, slots, dtype=torch.float64)
        self.chance = torch.zeros(slots, dtype=torch.float64)  # of attention that looks everywhere alike
        # Sums over queries: the entropy and the maximum of each row, and attention times distance, without BOS.
        self.entropy = torch.zeros(n_heads, dtype=torch.float64)
        self.maximum = torch.zeros(n_heads, dtype=torch.float64)
        self.distance = torch.zeros(n_heads, dtype=torch.float64)
        if d_vocab is not None:
            self.reads = Tally(d_vocab)
            # Attention besides BOS, by the token that looks and by the token looked at.
            self.by_query = torch.zeros(n_heads, d_vocab, dtype=torch.float64)
            self.by_key = torch.zeros(n_heads, d_vocab, dtype=torch.float64)

    def add_features(
        self,
        reader: Reader,
        chunk: Chunk,
        reads: Float[Tensor, "context head feature source"],
        firings: Firings,
        before: Int[Tensor, " d_sae"],
    ) -> None:
        """Attribute the firings of features that fired less than DFA_FIRINGS times `before` the chunk."""
        firings = firings.where((before < DFA_FIRINGS).to(firings.feature.device)[firings.feature])
        self.firings += torch.bincount(firings.feature.cpu(), minlength=len(self.firings))
        per_firing = chunk.tokens.shape[1] * (reads.shape[1] if reader.is_dense else 1)
        for tile in torch.arange(len(firings.feature)).split(max(1, _TILE // per_firing)):
            part = firings.where(tile)
            context, query, feature, _ = part
            attribution = reader.attribute(chunk, reads, part)  # [firing, reader, source]
            # A source in the future has slot -1 and no attention.
            slots = chunk.slots[context, query].clamp_min(0)  # [firing, source]
            mass = attribution.new_zeros(len(tile), len(dfa.SLOTS))
            mass.scatter_add_(1, slots, attribution.relu().sum(1))
            self.mass.index_add_(0, feature.cpu(), mass.double().cpu())
            if hasattr(self, "reads"):
                largest, source = attribution.sum(1).max(1)
                positive = largest > 0
                self.reads.add(feature[positive], chunk.tokens[context, source][positive])

    def add_heads(
        self,
        chunk: Chunk,
        reads: Float[Tensor, "context head feature source"],
        f: Float[Tensor, "context query block feature"],
        first_query: int,
    ) -> None:
        """Sum the attention, and the positive DFA of all active features, of whole heads."""
        active = (f > 0).float().expand(-1, -1, reads.shape[1], -1)  # if dense, every head is read by every feature
        uniform = dfa.uniform_pattern(f.shape[1])
        for tokens, pattern, read, of_context, slots in zip(
            chunk.tokens.cpu(), chunk.pattern, reads, active, chunk.slots, strict=True
        ):
            mass = dfa.positive_mass(pattern, read.mT, of_context)
            self.chance += dfa.mass_per_slot(uniform, slots.cpu(), first_query)[0].double()
            sums = RowSums(*(each.double().cpu() for each in row_sums(pattern, slots, first_query)))
            self.head_attention += sums.mass
            self.entropy += sums.entropy
            self.maximum += sums.maximum
            self.distance += sums.distance
            if hasattr(self, "by_key"):
                self.by_query.index_add_(1, tokens[first_query:], sums.by_query)
                self.by_key.index_add_(1, tokens[1:], sums.by_key)
            self.head_dfa += dfa.mass_per_slot(mass, slots, first_query).double().cpu()
        self.head_tokens += f[:, first_query:, 0, 0].numel()

    def absorb(self, other: "Sources") -> None:
        """Add what another saw of other contexts."""
        for name, value in vars(other).items():
            if isinstance(value, Tally):
                self.reads.absorb(value)
            else:
                getattr(self, name).add_(value)


class Cofiring:
    """Which features fire together: the firings of the first tokens, as a sparse matrix."""

    def __init__(self) -> None:
        self.pairs = torch.tensor(0)
        self.context: list[Tensor] = []
        self.feature: list[Tensor] = []
        self.value: list[Tensor] = []
        self.per_token: list[Tensor] = []

    def add(self, firings: Firings, chunk: Chunk) -> None:
        """Keep the firings of a chunk, for which there must be room."""
        shape = chunk.tokens.shape
        token = (firings.context * shape[1] + firings.position).cpu()
        counts = torch.bincount(token, minlength=shape.numel()).view(shape)[:, 1:]
        self.context.append(chunk.ids)
        self.feature.append(firings.feature.int().cpu())
        self.value.append(firings.value.half().cpu())
        self.per_token.append(counts.flatten().int())
        self.pairs += len(token)

    def absorb(self, other: "Cofiring") -> None:
        """Add what another kept of other contexts, in the order of the text."""
        self.pairs += other.pairs
        for name in ("context", "feature", "value", "per_token"):
            getattr(self, name).extend(getattr(other, name))
        if not self.context:
            return
        context = torch.cat(self.context)
        per_token = torch.cat(self.per_token).view(len(context), -1)  # [context, pos]
        of_pair = context.repeat_interleave(per_token.sum(1)).argsort(stable=True)
        for pairs in (self.feature, self.value):
            pairs[:] = [torch.cat(pairs)[of_pair]]
        self.per_token[:] = [per_token[context.argsort()].flatten()]
        self.context[:] = [context.sort().values]

    def tokens(self) -> np.ndarray:
        """Active features of each token kept."""
        return torch.cat(self.per_token).numpy()

    def matrix(self, n_tokens: int, d_sae: int) -> sp.csr_matrix:
        """Activations [token, feature] of the first tokens."""
        bounds = np.concatenate([[0], np.cumsum(self.tokens()[:n_tokens], dtype=np.int64)])
        feature = torch.cat(self.feature)[: bounds[-1]].numpy()
        value = torch.cat(self.value)[: bounds[-1]].float().clamp_min(1e-7).numpy()  # fp16 may round to 0
        return sp.csr_matrix((value, feature, bounds), shape=(len(bounds) - 1, d_sae))


def state(statistics: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor that `statistics` consists of, by name; lists of tensors are joined first."""
    tensors: dict[str, Tensor] = {}
    for name, value in vars(statistics).items():
        if name.startswith("_"):
            continue
        if isinstance(value, list):
            value[:] = [torch.cat(value)] if value else []
            value = value[0] if value else torch.empty(0)
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        else:
            tensors |= state(value, f"{prefix}{name}.")
    return tensors


def load_state(statistics: Any, saved: dict[str, Tensor], prefix: str = "") -> None:
    """Put back what `state` returned."""
    for name, value in vars(statistics).items():
        if name.startswith("_"):
            continue
        if isinstance(value, list):
            value[:] = [saved[prefix + name]] if saved[prefix + name].numel() else []
        elif isinstance(value, Tensor):
            setattr(statistics, name, saved[prefix + name])
        else:
            load_state(value, saved, f"{prefix}{name}.")


def firings_before(so_far: Int[Tensor, " feature"], fired: list[Firings]) -> Int[Tensor, "chunk feature"]:
    """Firings of each feature in the text before each chunk of this process's forward.

    Processes take the forwards of a text in turns (`passes.rounds`), so all call this together.

    Args:
        so_far: in the forwards of this process.
        fired: in each chunk of the next one.
    """
    own = so_far.new_zeros(len(fired), len(so_far))
    for counts, firings in zip(own, fired, strict=True):
        counts += torch.bincount(firings.feature.cpu(), minlength=len(so_far))
    every = ranks.gathered(torch.stack([so_far, own.sum(0)])[None])  # [process, earlier or now, feature]
    return every[:, 0].sum(0) + every[: ranks.index(), 1].sum(0) + own.cumsum(0) - own


def collect(filled: list[Any], empty: list[Any]) -> None:
    """Give the first process what all have seen; the others have seen nothing then.

    Args:
        empty: the same as `filled`, with nothing in them.
    """
    seen, nothing = (
        {name: value for place, each in enumerate(those) for name, value in state(each, f"{place}.").items()}
        for those in (filled, empty)
    )
    for tensors in ranks.to_first(seen):
        for place, (kept, other) in enumerate(zip(filled, empty, strict=True)):
            load_state(other, tensors, f"{place}.")
            kept.absorb(other)
    if not ranks.is_first():
        for place, kept in enumerate(filled):
            load_state(kept, nothing, f"{place}.")


def _ranks(group: Int[Tensor, " entry"]) -> tuple[Int[Tensor, " entry"], Int[Tensor, " entry"]]:
    """An order that brings groups together, and the place of each entry of that order within its group."""
    order = group.argsort(stable=True)
    group = group[order]
    starts = torch.ones(len(group), dtype=torch.bool)
    starts[1:] = group[1:] != group[:-1]
    index = torch.arange(len(group))
    return order, index - torch.cummax(torch.where(starts, index, 0), 0).values if len(group) else index


def _strongest_of_group(group: Int[Tensor, " entry"], value: Float[Tensor, " entry"]) -> Int[Tensor, " kept"]:
    """Index of the largest value of each group, the first of equal ones; in the order of the entries."""
    order = value.argsort(descending=True, stable=True)
    by_group, rank = _ranks(group[order])
    return order[by_group[rank == 0]].sort().values


def _random(at: Int[Tensor, " firing"], feature: Int[Tensor, " firing"]) -> Float[Tensor, " firing"]:
    """A uniform number in [0, 1) that depends on the firing alone (SplitMix64's mixing, Steele et al. 2014).

    So the sample is the same however the text is cut, and after --resume; 34 ns a firing, torch.rand 6 (AMD EPYC).
    """
    x = at * -7046029254386353131 + feature * -4417276706812531889 + 1
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return (x >> 40 & (1 << 24) - 1).float() / (1 << 24)
