"""Activations to shuffled batches of rows, from the disk cache or straight from the model.

Rows are head outputs `[row, head, d_head]` in float16, BOS positions left out. Two sources give them
in groups that fit in memory; `batches` shuffles within a group. Groups are far apart in the text
(contexts are visited in random order, shards are regrouped on every pass), and a position in the
stream is just a step number, so resuming is exact and stores no rows.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.checkpoint import write_atomically, write_json
from trainer.config import ActivationsConfig, cache_dir
from trainer.lm import LanguageModel
from trainer.text import Corpus

_SHARD_CONTEXTS = 256
_LM_BATCH_TOKENS = 4096  # tokens of one forward: enough to fill the cores, small enough for a laptop

Progress = Callable[[int, int], None]


class Source(Protocol):
    """Where rows come from: `rows(g)` says how many the g-th group has, `groups` yields them.

    `distinct_tokens` is the length of one pass.
    """

    distinct_tokens: int

    def rows(self, group: int) -> int: ...

    def groups(self, start: int) -> Iterator[Float[Tensor, "row head d_head"]]: ...


def open_source(
    lm: LanguageModel, config: ActivationsConfig, corpus: Corpus, n_tokens: int, buffer_rows: int, seed: int
) -> "CachedActivations | LiveActivations":
    """A source for a run of `n_tokens`: the disk cache where it fits in `cache_gb`, else the model itself.

    It holds fewer distinct tokens where `distinct_tokens` or the text does, and is then read in
    several passes. The cache still has to be filled.
    """
    n_tokens = min(n_tokens, config.distinct_tokens or n_tokens)
    per_context = corpus.context_size - 1
    n_contexts = _SHARD_CONTEXTS * -(-n_tokens // (per_context * _SHARD_CONTEXTS))  # whole shards
    if corpus.finite:
        n_contexts = min(n_contexts, corpus.n_train_contexts)
    if n_contexts * per_context * lm.n_heads * lm.d_head * 2 > config.cache_gb * 1e9:
        return LiveActivations(lm, config.hook_layer, corpus, n_contexts, buffer_rows)
    key = CacheKey(
        model=lm.name,
        model_fingerprint=lm.fingerprint(),
        model_dtype=config.model_dtype,
        hook_name=config.hook_name,
        text=corpus.name,
        text_fingerprint=corpus.fingerprint,
        context_size=corpus.context_size,
        n_heads=lm.n_heads,
        d_head=lm.d_head,
    )
    return CachedActivations(cache_dir() / "activations", key, n_contexts, buffer_rows, seed)


def batches(source: Source, batch_size: int, seed: int, start: int = 0) -> Iterator[Float[Tensor, "batch head d_head"]]:
    """Endless shuffled batches; `start` skips that many, exactly as if they had been taken.

    The few rows of a group that do not fill a batch are dropped.

    Raises:
        ValueError: a group does not hold one batch.
    """
    group = 0
    while start >= (count := _batches_in(source, group, batch_size)):
        start -= count
        group += 1
    for index, rows in enumerate(source.groups(group), start=group):
        order = torch.from_numpy(np.random.default_rng([seed, index]).permutation(len(rows)))
        for step in range(start, _batches_in(source, index, batch_size)):
            yield rows[order[step * batch_size : (step + 1) * batch_size]].float()
        start = 0


def _batches_in(source: Source, group: int, batch_size: int) -> int:
    rows = source.rows(group)
    if rows < batch_size:
        raise ValueError(
            f"the text gives {rows:,} activations at a time, fewer than one batch of {batch_size:,}: "
            "give more text or lower batch_size"
        )
    return rows // batch_size


@dataclass(frozen=True)
class CacheKey:
    """Everything that decides the values in a cache; part of its path and of its meta.json."""

    model: str
    model_fingerprint: str
    model_dtype: str
    hook_name: str
    text: str
    text_fingerprint: str
    context_size: int
    n_heads: int
    d_head: int


class CachedActivations:
    """Activations on disk, in shards of 256 contexts: `<root>/<model>-L<layer>-<hash>/shard-00000.safetensors`.

    `fill` harvests the shards that are missing, one at a time, so an interrupted harvest goes on where
    it stopped and a longer run extends a shorter one's cache.
    """

    def __init__(self, root: Path, key: CacheKey, n_contexts: int, buffer_rows: int, seed: int) -> None:
        digest = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()[:12]
        self.folder = root / f"{Path(key.model).name}-{key.hook_name.split('.')[1]}-{digest}"
        self.key = key
        self.seed = seed
        per_context = key.context_size - 1
        sizes = [min(_SHARD_CONTEXTS, n_contexts - first) for first in range(0, n_contexts, _SHARD_CONTEXTS)]
        self._shard_rows = [contexts * per_context for contexts in sizes]
        self.distinct_tokens = sum(self._shard_rows)
        self._per_group = max(1, buffer_rows // (_SHARD_CONTEXTS * per_context))

    def missing(self) -> list[int]:
        """Shards still to be harvested.

        Raises:
            ValueError: the folder holds another cache, or a shard that is damaged.
        """
        meta = self.folder / "meta.json"
        if meta.exists() and json.loads(meta.read_text()) != asdict(self.key):
            raise ValueError(f"{meta} describes other activations than its folder's name says: delete the folder")
        return [index for index in range(len(self._shard_rows)) if not self._is_whole(index)]

    def fill(self, lm: LanguageModel, layer: int, corpus: Corpus, progress: Progress) -> None:
        """Harvest the missing shards. `progress(done, total)` is told tokens after every forward.

        Raises:
            ValueError: the activations do not fit in float16, or the disk is full.
        """
        missing = self.missing()
        total = sum(self._shard_rows[index] for index in missing)
        done = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "meta.json", asdict(self.key))
            # One stream for all shards: a streamed data set starts over at every call of `train`.
            position = missing[0] * _SHARD_CONTEXTS if missing else 0
            stream = corpus.train(position)
            for index in missing:
                first = index * _SHARD_CONTEXTS
                n_contexts = self._shard_rows[index] // (self.key.context_size - 1)
                found = list(islice(stream, first - position, first - position + n_contexts))
                position = first + n_contexts
                if len(found) < n_contexts:
                    raise ValueError(
                        f"{corpus.name} ends after {first + len(found):,} contexts of {corpus.context_size} tokens, "
                        "too few for this run: lower total_training_steps"
                    )
                contexts = torch.stack(found)
                rows = []
                for chunk in harvest(lm, layer, contexts):
                    rows.append(chunk)
                    done += len(chunk)
                    progress(done, total)
                shard = {"z": torch.cat(rows)}
                write_atomically(self._path(index), partial(save_file, shard))
        except OSError as error:
            raise ValueError(f"the activation cache {self.folder} could not be written: {error}") from error

    def rows(self, group: int) -> int:
        return sum(self._shard_rows[index] for index in self._shards_of(group))

    def groups(self, start: int) -> Iterator[Float[Tensor, "row head d_head"]]:
        group = start
        while True:
            yield torch.cat([load_file(self._path(index))["z"] for index in self._shards_of(group)])
            group += 1

    def _shards_of(self, group: int) -> list[int]:
        """Shards are regrouped in a new order on every pass over the cache."""
        n_groups = -(-len(self._shard_rows) // self._per_group)
        order = np.random.default_rng([self.seed, group // n_groups]).permutation(len(self._shard_rows))
        # array_split: groups of nearly equal size, so that the last one is never a sliver.
        return np.array_split(order, n_groups)[group % n_groups].tolist()

    def _path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def _is_whole(self, index: int) -> bool:
        path = self._path(index)
        if not path.exists():
            return False
        shape = [self._shard_rows[index], self.key.n_heads, self.key.d_head]
        try:
            with safe_open(path, framework="pt") as file:
                found = file.get_slice("z")
                return found.get_shape() == shape and found.get_dtype() == "F16"
        except (SafetensorError, OSError) as error:
            raise ValueError(f"activation shard {path} is damaged ({error}): delete it to harvest it again") from error


class LiveActivations:
    """Activations straight from the model, for runs too large for the disk: one group at a time in memory."""

    def __init__(self, lm: LanguageModel, layer: int, corpus: Corpus, n_contexts: int, buffer_rows: int) -> None:
        self._lm, self._layer, self._corpus, self._pass = lm, layer, corpus, n_contexts
        self._per_context = corpus.context_size - 1
        self.distinct_tokens = n_contexts * self._per_context
        self._contexts = min(max(1, buffer_rows // self._per_context), n_contexts)

    def rows(self, group: int) -> int:
        return self._contexts * self._per_context

    def groups(self, start: int) -> Iterator[Float[Tensor, "row head d_head"]]:
        contexts = self._endless(start * self._contexts % self._pass)
        while True:
            block = torch.stack(list(islice(contexts, self._contexts)))
            yield torch.cat(list(harvest(self._lm, self._layer, block)))

    def _endless(self, start: int) -> Iterator[Int[Tensor, " pos"]]:
        while True:
            found = False
            for context in islice(self._corpus.train(start), self._pass - start):
                found = True
                yield context
            if not found:
                raise ValueError(
                    f"{self._corpus.name} ends before context {start:,} of {self._corpus.context_size} tokens"
                )
            start = 0


def harvest(
    lm: LanguageModel, layer: int, contexts: Int[Tensor, "context pos"]
) -> Iterator[Float[Tensor, "row head d_head"]]:
    """Head outputs of every position but BOS, in float16 on the CPU, one forward at a time.

    Raises:
        ValueError: a value does not fit in float16.
    """
    for chunk in contexts.split(max(1, _LM_BATCH_TOKENS // contexts.shape[1])):
        z = lm.hook_z(chunk, layer)[:, 1:].flatten(0, 1).half().cpu()
        if not z.isfinite().all():
            raise ValueError(f"head outputs of {lm.name} layer {layer} do not fit in float16")
        yield z
