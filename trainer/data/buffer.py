"""Activations to shuffled batches of rows, from the disk cache or straight from the model.

Rows are head outputs `[row, layer, head, d_head]` in float16, BOS positions left out. Two sources give them
in groups that fit in memory; `batches` shuffles within a group. Groups are far apart in the text
(contexts are visited in random order, shards are regrouped on every pass), and a position in the
stream is just a step number, so resuming is exact and stores no rows.

Several processes each read a part of every group, and swap rows so that the batches are those of one process
(`trainer.data.deal`): the step number is the position for any number of them. A data set is read in streams, each
process those of its part; how many there are depends on the data set alone.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer import ranks
from trainer.config import ActivationsConfig, TrainingConfig
from trainer.data.deal import deal
from trainer.data.text import Corpus
from trainer.files import cache_dir, flaw, load_tensors, require_file, save_tensors, sweep, write_json
from trainer.model.lm import LanguageModel
from trainer.precision import matmuls_are_tf32

_SHARD_CONTEXTS = 256
_LM_BATCH_TOKENS, _OF_A_GPU = 4096, 16_384  # tokens of one forward: fill the device, and fit a laptop

Progress = Callable[[int, int], None]


def open_source(
    lm: LanguageModel,
    config: ActivationsConfig,
    layers: list[int],
    corpus: Corpus,
    n_tokens: int,
    buffer_rows: int,
    seed: int,
    begun: str | None = None,
) -> "Source":
    """A source for a run of `n_tokens`: the disk cache where it fits in `cache_gb` or is whole, else the model itself.

    It holds fewer distinct tokens where `distinct_tokens` or the text does, and is then read in
    several passes. The cache still has to be filled. Order and grouping do not depend on the layers.

    Args:
        begun: cached or live, as the run that is continued was.
    """
    n_tokens = min(n_tokens, config.distinct_tokens or n_tokens)
    n_contexts = corpus.n_contexts(n_tokens)
    if corpus.n_train_contexts is not None:
        n_contexts = min(n_contexts, corpus.n_train_contexts)
    computed_by = [f"{name} {version(name)}" for name in ("torch", "transformers", "transformer-lens")]
    if matmuls_are_tf32(lm.device):
        computed_by.append("TF32")
    keys = [
        CacheKey(
            model=lm.name,
            model_fingerprint=lm.fingerprint(),
            model_dtype=config.model_dtype,
            hook_name=f"blocks.{layer}.attn.hook_z",
            text=corpus.name,
            text_fingerprint=corpus.fingerprint,
            context_size=corpus.context_size,
            n_heads=lm.n_heads,
            d_head=lm.d_head,
            versions=", ".join(computed_by),
        )
        for layer in layers
    ]
    cached = CachedActivations(cache_dir() / "activations", keys, layers, n_contexts, buffer_rows, seed)
    fits = cached.distinct_tokens * bytes_per_row(lm, len(layers)) <= config.cache_gb * 1e9
    if begun == "cached" or (begun is None and (fits or not ranks.any_of(bool(cached.missing())))):
        return cached
    return LiveActivations(lm, layers, corpus, n_contexts, buffer_rows)


def batches(
    source: "Source", batch_size: int, seed: int, start: int = 0, device: str = "cpu"
) -> Iterator[Float[Tensor, "share layer head d_head"]]:
    """Endless shuffled batches, as they are kept (float16); `start` skips that many, exactly as if they had been taken.

    The few rows of a group that do not fill a batch are dropped. Of several processes each gets its share of a batch.

    Raises:
        ValueError: a group does not hold one batch.
    """
    group = 0
    while start >= (of_group := batches_in(source, group, batch_size)):
        start -= of_group
        group += 1
    groups, share = source.groups(group), ranks.share(batch_size)
    for index in count(group):
        rows = next(groups)
        # On the device as a whole: there a shuffled batch is one gather.
        rows = rows.to(device)
        order = torch.from_numpy(np.random.default_rng([seed, index]).permutation(source.rows(index))).to(device)
        rows, order = deal(rows, order, source.parts(index), batch_size)
        for step in range(start, batches_in(source, index, batch_size)):
            yield _taken(rows, order[step * share : (step + 1) * share])
        del rows  # before the next group is asked for
        start = 0


def _taken(rows: Float[Tensor, "row layer head d_head"], at: Int[Tensor, " taken"]) -> Tensor:
    """Some rows; on a CPU by numpy, on one thread: those of torch wait for each other (`trainer.kernels.workers`)."""
    return torch.from_numpy(rows.numpy()[at.numpy()]) if rows.device.type == "cpu" else rows[at]


def _read_ahead(items: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same items, the next one being read while one is used."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, items)
        while True:
            item = coming.result()
            coming = reader.submit(next, items)
            yield item
            del item


def buffer_rows(lm: LanguageModel, n_layers: int, cfg: TrainingConfig) -> int:
    """Rows that are shuffled together: as many as `buffer_tokens` and half of `buffer_gb` allow.

    Raises:
        ValueError: they are less than a batch.
    """
    rows = min(cfg.buffer_tokens, int(cfg.buffer_gb * 1e9 / 2 / bytes_per_row(lm, n_layers)))
    if rows < cfg.batch_size:
        raise ValueError(
            f"buffer_gb {cfg.buffer_gb:g} holds {rows:,} tokens of {n_layers} layers at a time, less than a batch of "
            f"{cfg.batch_size:,}: raise --buffer_gb, lower --batch_size or train fewer layers at a time"
        )
    return rows


def bytes_per_row(lm: LanguageModel, n_layers: int) -> int:
    """Of the head outputs of one token."""
    return n_layers * lm.n_heads * lm.d_head * 2


def batches_in(source: "Source", group: int, batch_size: int) -> int:
    """Batches of one group.

    Raises:
        ValueError: there is not even one.
    """
    rows = source.rows(group)
    if rows < batch_size:
        raise ValueError(
            f"the text gives {rows:,} activations at a time, fewer than one batch of {batch_size:,}: "
            "give more text, more distinct_tokens or a lower batch_size"
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
    versions: str
    """of the libraries that compute the activations"""


class Missing(NamedTuple):
    """What a cache lacks: bytes to write, and tokens that the model reads for them."""

    bytes: int
    tokens: int


class CachedActivations:
    """Activations on disk, in shards of 256 contexts: `<root>/<model>-<layer>-<hash>/shard-00000.safetensors`.

    `fill` harvests the shards that are missing, one at a time and for all layers in one forward, so an
    interrupted harvest goes on where it stopped and a longer run extends a shorter one's cache. The last shard has
    as many contexts as the run needs: a longer run harvests it again, a shorter one reads its first rows.
    """

    def __init__(
        self, root: Path, keys: list[CacheKey], layers: list[int], n_contexts: int, buffer_rows: int, seed: int
    ) -> None:
        self.keys = {self._folder(root, key): key for key in keys}
        self.layers = dict(zip(self.keys, layers, strict=True))
        self.context_size = keys[0].context_size
        self.seed = seed
        per_context = self.context_size - 1
        sizes = [min(_SHARD_CONTEXTS, n_contexts - first) for first in range(0, n_contexts, _SHARD_CONTEXTS)]
        self._shard_rows = [contexts * per_context for contexts in sizes]
        self.distinct_tokens = sum(self._shard_rows)
        # A last shard that fills neither a shard nor the buffer joins a group: alone it might not hold one batch.
        joins = len(sizes) > 1 and self._shard_rows[-1] < min(self._shard_rows[0], buffer_rows)
        self._n_dealt = len(sizes) - joins
        self._n_groups = -(-self._n_dealt // max(1, buffer_rows // (_SHARD_CONTEXTS * per_context)))

    @staticmethod
    def _folder(root: Path, key: CacheKey) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()[:12]
        return root / f"{Path(key.model).name}-{key.hook_name.split('.')[1]}-{digest}"

    def missing(self) -> dict[int, list[Path]]:
        """Shards still to be harvested, with the folders that lack them.

        Raises:
            ValueError: a folder holds another cache, or a shard that is damaged.
        """
        for folder, key in self.keys.items():
            meta = folder / "meta.json"
            if meta.exists() and json.loads(meta.read_text()) != asdict(key):
                raise ValueError(f"{meta} describes other activations than its folder's name says: delete the folder")
        lacking = {
            index: [folder for folder in self.keys if not self._is_whole(folder, index)]
            for index in range(len(self._shard_rows))
        }
        return {index: folders for index, folders in lacking.items() if folders}

    def to_harvest(self) -> Missing:
        """What `fill` would do."""
        missing, key = self.missing(), next(iter(self.keys.values()))
        tokens = {index: self._shard_rows[index] for index in missing}
        wanted = sum(tokens[index] * len(folders) for index, folders in missing.items())
        return Missing(wanted * key.n_heads * key.d_head * 2, sum(tokens.values()))

    def fill(self, lm: LanguageModel, corpus: Corpus, progress: Progress) -> None:
        """Harvest the missing shards. `progress(done, total)` is told tokens after every forward.

        Of several processes each harvests the shards of its share of the streams, and waits for the others.

        Raises:
            ValueError: the activations do not fit in float16, or the disk is full.
        """
        # By its number, not by its place among those that are missing: they become fewer while others harvest.
        n_streams = corpus.n_streams
        mine = [index for index in range(len(self._shard_rows)) if _harvester(index, n_streams) == ranks.index()]
        missing = {index: folders for index, folders in self.missing().items() if index in mine}
        total = sum(self._shard_rows[index] for index in missing)
        done = 0
        try:
            self._describe()
            ranks.wait()
            # Each stream is opened once: it starts over at every call of `train`.
            opened: dict[int, tuple[Iterator[Int[Tensor, " pos"]], int]] = {}
            for index, folders in missing.items():
                turn, stream = divmod(index, n_streams)
                first = turn * _SHARD_CONTEXTS
                contexts, position = opened.get(stream) or (corpus.train(first, stream), first)
                n_contexts = self._shard_rows[index] // (self.context_size - 1)
                found = list(islice(contexts, first - position, first - position + n_contexts))
                opened[stream] = contexts, first + n_contexts
                if len(found) < n_contexts:
                    raise _too_short(corpus, first + len(found), self.distinct_tokens)
                rows = []
                for chunk in harvest(lm, [self.layers[folder] for folder in folders], torch.stack(found)):
                    rows.append(chunk.cpu())
                    done += len(chunk)
                    progress(done, total)
                for folder, z in zip(folders, torch.cat(rows).unbind(1), strict=True):
                    save_tensors(_shard(folder, index), {"z": z}, f"{folder.name} {index}")
        except OSError as error:
            raise ValueError(f"the activation cache could not be written: {error}") from error
        ranks.wait()

    @ranks.by_first
    def _describe(self) -> None:
        """Folders that say what they are to hold, without what a killed process left there."""
        for folder, key in self.keys.items():
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
            write_json(folder / "meta.json", asdict(key))

    def rows(self, group: int) -> int:
        return sum(self._shard_rows[index] for index in self._shards_of(group))

    def parts(self, group: int) -> list[int]:
        return ranks.parts(self.rows(group))

    def groups(self, start: int) -> Iterator[Float[Tensor, "row layer head d_head"]]:
        return _read_ahead(map(self._read, count(start)))

    def _read(self, group: int) -> Float[Tensor, "row layer head d_head"]:
        first, end = self.parts(group)[ranks.index() :][:2]
        key = next(iter(self.keys.values()))
        rows = torch.empty(end - first, len(self.keys), key.n_heads, key.d_head, dtype=torch.float16)
        for place, folder in enumerate(self.keys):
            _fill(rows[:, place], self._part(folder, group))
        return rows

    def _part(self, folder: Path, group: int) -> Iterator[Float[Tensor, "row head d_head"]]:
        """This process's rows of a group; a shard in which the parts of two meet is read by both."""
        first, end = self.parts(group)[ranks.index() :][:2]
        begin = 0
        for index in self._shards_of(group):
            low, high = max(first - begin, 0), min(end - begin, self._shard_rows[index])
            if low < high:
                yield self._load(folder, index)[low:high]
            begin += self._shard_rows[index]

    def _load(self, folder: Path, index: int) -> Float[Tensor, "row head d_head"]:
        try:
            z = load_tensors(_shard(folder, index), f"{folder.name} {index}")["z"]
        except ValueError as error:
            raise ValueError(
                f"{error}: delete it, and the same command with --resume=true harvests it again"
            ) from error
        if not torch.stack(z.aminmax()).isfinite().all():
            raise ValueError(f"{_shard(folder, index)} holds activations that are not finite: delete it")
        return z[: self._shard_rows[index]]

    def _shards_of(self, group: int) -> list[int]:
        """Shards are regrouped in a new order on every pass over the cache."""
        turn, place = divmod(group, self._n_groups)
        order = np.random.default_rng([self.seed, turn]).permutation(self._n_dealt)
        # array_split: groups of nearly equal size, the last one never the largest.
        shards = np.array_split(order, self._n_groups)[place].tolist()
        joining = range(self._n_dealt, len(self._shard_rows)) if place == self._n_groups - 1 else ()
        return [*shards, *joining]

    def _is_whole(self, folder: Path, index: int) -> bool:
        path = _shard(folder, index)
        if not path.exists():
            return False
        key = self.keys[folder]
        try:
            require_file(path)
            with safe_open(path, framework="pt") as file:
                found = file.get_slice("z")
                n_rows, *shape = found.get_shape()
                fits = n_rows >= self._shard_rows[index] and shape == [key.n_heads, key.d_head]
                return fits and found.get_dtype() == "F16"
        except (SafetensorError, OSError) as error:
            raise ValueError(f"activation shard {flaw(path, error)}: delete it to harvest it again") from error


def _fill(rows: Tensor, parts: Iterable[Tensor]) -> None:
    """Write parts one after the other, each gone before the next: joined in the end, all would be held twice."""
    begin = 0
    for part in parts:
        rows[begin : begin + len(part)] = part
        begin += len(part)


def _shard(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def _harvester(index: int, n_streams: int) -> int:
    """The process that harvests a shard: each has some streams, or some of the shards of one."""
    turn, stream = divmod(index, n_streams)
    first, end = (ranks.size() * each // n_streams for each in (stream, stream + 1))
    return first + turn % max(1, end - first)


class LiveActivations:
    """Activations straight from the model, for runs too large for the disk: one group at a time in memory.

    A group has as many contexts of every stream of the text, those of the first stream first. Of several processes
    each runs the model on its part of them, and reads the streams that they are of: in every group the same.

    Raises:
        ValueError: a group has fewer contexts than there are processes.
    """

    def __init__(self, lm: LanguageModel, layers: list[int], corpus: Corpus, n_contexts: int, buffer_rows: int) -> None:
        self._lm, self._layers, self._corpus = lm, layers, corpus
        self._per_context = corpus.context_size - 1
        self._pass = -(-n_contexts // corpus.n_streams)  # contexts of one stream
        self.distinct_tokens = self._pass * corpus.n_streams * self._per_context
        self._of_each = min(max(1, buffer_rows // self._per_context // corpus.n_streams), self._pass)
        self._contexts = self._of_each * corpus.n_streams
        if self._contexts < ranks.size():
            raise ValueError(
                f"a buffer of {self._contexts} contexts cannot be shared by {ranks.size()} processes: "
                "raise --buffer_tokens, or give more text"
            )

    def rows(self, group: int) -> int:
        return self._contexts * self._per_context

    def parts(self, group: int) -> list[int]:
        return [contexts * self._per_context for contexts in ranks.parts(self._contexts)]

    def groups(self, start: int) -> Iterator[Float[Tensor, "row layer head d_head"]]:
        first, end = ranks.parts(self._contexts)[ranks.index() :][:2]
        mine = []  # streams, and which of their contexts
        for stream in range(first // self._of_each, -(-end // self._of_each)):
            before = stream * self._of_each
            contexts = self._endless(stream, start * self._of_each % self._pass)
            mine.append((contexts, slice(max(first - before, 0), end - before)))
        blocks = (
            torch.stack([each for contexts, part in mine for each in list(islice(contexts, self._of_each))[part]])
            for _ in count()
        )
        for block in _read_ahead(blocks):  # text becomes tokens while the model and the SAEs compute
            shape = len(block) * self._per_context, len(self._layers), self._lm.n_heads, self._lm.d_head
            rows = torch.empty(shape, dtype=torch.float16, device=self._lm.device)
            _fill(rows, harvest(self._lm, self._layers, block))
            yield rows
            del rows  # before the next ones are made

    def _endless(self, stream: int, start: int) -> Iterator[Int[Tensor, " pos"]]:
        while True:
            found = start
            for context in islice(self._corpus.train(start, stream), self._pass - start):
                found += 1
                yield context
            if found < self._pass:  # a streamed data set that is shorter than the run
                raise _too_short(self._corpus, found, self.distinct_tokens)
            start = 0


def _too_short(corpus: Corpus, found: int, asked: int) -> ValueError:
    """Where a stream has fewer contexts than are read of it.

    Of several streams only what is asked for is named, so that all processes say the same.
    """
    ends = f"ends after {found:,} contexts of {corpus.context_size} tokens"
    if corpus.n_streams > 1:
        ends = f"ends before {asked:,} tokens are read, as many of each of its {corpus.n_streams} streams"
    return ValueError(f"{corpus.name} {ends}: too few for this run, lower total_training_steps or distinct_tokens")


# `rows(g)` says how many the g-th group has, `parts(g)` at which of them the part of each process begins, and the end,
# `groups(start)` yields this process's part of each, `distinct_tokens` is the length of a pass.
Source = CachedActivations | LiveActivations


def harvest(
    lm: LanguageModel, layers: list[int], contexts: Int[Tensor, "context pos"]
) -> Iterator[Float[Tensor, "row layer head d_head"]]:
    """Head outputs of every position but BOS, in float16 on the model's device, one forward at a time.

    Raises:
        ValueError: a value does not fit in float16.
    """
    at_once = _OF_A_GPU if lm.device.type == "cuda" else _LM_BATCH_TOKENS
    for chunk in contexts.split(max(1, at_once // contexts.shape[1])):
        z = torch.stack(lm.z_of(chunk, layers), dim=2)[:, 1:].flatten(0, 1).half()
        if not z.isfinite().all():
            raise ValueError(f"head outputs of {lm.name} layer {', '.join(map(str, layers))} do not fit in float16")
        yield z
