"""From checkpoints to their artefacts: both passes, then the tables; what is interrupted can be resumed."""

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from analysis import attribution as dfa
from analysis import schema, store
from analysis.attribution import Reader
from analysis.corpus.descriptions import QUANTILE, FurtherFirings, choose_detection, score_descriptions
from analysis.corpus.features import count_table, describe, feature_table, shortened
from analysis.corpus.heads import Copying, copying, head_table
from analysis.corpus.mean_pattern import MeanPattern, pattern_table
from analysis.corpus.pairs import Redundancy, compare_features
from analysis.corpus.passes import SMALL, Strips, choose_examples, chunks, feed, sources_on_repeats
from analysis.corpus.running_statistics import FeatureStatistics, Sources, collect, load_state, state
from analysis.logits import head_of_features, inverse_scale, logit_effects, written
from analysis.store import Analysis
from trainer import checkpoint, ranks
from trainer.checkpoint import Checkpoint, CheckpointError, by_origin
from trainer.config import require
from trainer.data.text import Corpus
from trainer.errors import one_line
from trainer.figures import Count
from trainer.files import make_writable, parse_json, write_atomically
from trainer.interrupts import Interrupted, deferred_interrupts
from trainer.model.lm import LanguageModel, Layer, pick_device
from trainer.tracking import Mode, Tracked, reachable

_SAVE_SECONDS = 120  # between two saves of the state
_REPEATED_TOKENS = 4096  # random ones, repeated once, on which roles are scored
_SCALE_TOKENS = 2048  # that run through the whole model, for the scales of its norms
_SMALL_IN_SUMMARY = 0.1  # as `passes.SMALL`


@dataclass(frozen=True)
class AnalysisConfig:
    """What an analysis looks at."""

    tokens: int = 100_000
    """Tokens of text; fewer where the text has fewer."""
    dataset: str | None = None
    """Another text than the held-out documents of the one trained on: all of it, named as for training."""
    dataset_config: str | None = None
    """Configuration of that data set, where it has several."""
    dataset_split: str = "train"
    """Split of that data set."""
    text_column: str | None = None
    """Column of that text; default the one trained on."""
    examples: int = 20
    """Contexts kept of each feature in which it fires most."""
    quantile_examples: int = 10
    """Firings kept of each feature over the quantiles of its activations."""
    score_tokens: int = 10_000
    """Tokens of further text on which the descriptions of features are scored; fewer where the text has fewer."""
    seed: int = 0
    """Of the repeated random tokens, and of the examples on which descriptions are scored."""
    summary: bool = False
    """Write only what `schema.summarised` says, with one example of each feature."""

    def __post_init__(self) -> None:
        require(self.score_tokens >= 0, f"score_tokens must be 0 or more, got {self.score_tokens}")
        for key in ("tokens", "examples"):
            require(getattr(self, key) >= 1, f"{key} must be at least 1, got {getattr(self, key)}")
        named = (self.dataset_config, self.dataset_split, self.text_column) != (None, "train", None)
        require(
            self.dataset is not None or not named,
            "dataset_config, dataset_split and text_column are of another text: name it with --dataset",
        )
        n = self.quantile_examples
        require(0 <= n <= 50, f"quantile_examples must lie between 0 and 50, got {n}")


@dataclass(frozen=True)
class _Position:
    """How far a saved analysis was; fields of `Job`."""

    key: dict[str, Any]
    stage: Literal[1, 2]
    done: Count
    seconds: list[float]


class Job:
    """The analysis of one checkpoint on its way: contexts before `done` of the text went through pass `stage`.

    Of several processes each has what it has seen since `collect`, and the first one what all had seen before.

    Args:
        key: what an interrupted analysis must have in common with this one to be resumed.
        length: of a context, BOS included.
    """

    def __init__(
        self, trained: Checkpoint, layer: Layer, key: dict[str, Any], cfg: AnalysisConfig, length: int
    ) -> None:
        self.checkpoint, self.layer = trained, layer
        self.reader = Reader(trained.sae, layer)
        self.stage, self.done, self.seconds = 1, 0, [0.0, 0.0]
        self.seed, self.is_summary = cfg.seed, cfg.summary
        self._key, self._cfg, self._length = {**key, "weights": trained.weights_hash}, cfg, length
        self._folder = trained.path / ".analysis.state"
        self.statistics, self.pattern = self._empty()

    def begin_second(self) -> None:
        """Choose the examples whose strips the second pass fills, of all that was collected."""
        ranks.copied([*state(self.statistics.top).values(), *state(self.statistics.sample).values()])
        self.examples = choose_examples(self.statistics, self._cfg.quantile_examples, self._length)
        self.stage, self.done = 2, 0
        self.strips, self.further = self._empty()

    @property
    def filled(self) -> list[Any]:
        """What the pass fills."""
        return [self.statistics, self.pattern] if self.stage == 1 else [self.strips, self.further]

    def _empty(self) -> list[Any]:
        """The same before it."""
        if self.stage == 1:
            statistics = FeatureStatistics(
                self.reader, self.layer.lm.d_vocab, self._cfg.examples, has_pairs=not self.is_summary
            )
            return [statistics, MeanPattern(self.layer.n_heads, min(self._length, schema.PATTERN_CELLS))]
        small = _SMALL_IN_SUMMARY if self.is_summary else SMALL
        return [Strips(self.reader, self.examples, small), FurtherFirings(self.reader, self._key["n_contexts"])]

    def collect(self) -> None:
        """Give the first process what all have seen in this pass."""
        collect(self.filled, self._empty())

    @ranks.by_first
    def save(self) -> None:
        """Write what resuming needs of all that was collected, beside the checkpoint's own files."""
        tensors = state(self.statistics, "statistics.") | state(self.pattern, "pattern.")
        if self.stage == 2:
            tensors |= state(self.strips, "strips.") | state(self.further, "further.")
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        position = {"key": self._key, "stage": self.stage, "done": self.done, "seconds": self.seconds}
        metadata = {name: json.dumps(value) for name, value in position.items()}
        self._folder.mkdir(exist_ok=True)
        write_atomically(self._folder / "state.safetensors", lambda p: save_file(tensors, p, metadata))

    def load(self) -> None:
        """Go on from what `save` wrote, if it belongs to the same analysis; the first process has all of it.

        Raises:
            ValueError: it was begun with other options, or the file is damaged.
        """
        file = self._folder / "state.safetensors"
        tensors: dict[str, Tensor] = {}
        position = _Position(self._key, 1, 0, self.seconds)
        try:
            if ranks.is_first() and file.exists():
                with safe_open(file, framework="pt") as saved:
                    tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
                    metadata = saved.metadata() or {}
                values = {name: parse_json(value.encode(), Any) for name, value in metadata.items()}
                position = msgspec.convert(values, _Position)
                if position.key != self._key:
                    raise ValueError("it was begun with other options, text or weights")
                load_state(self.statistics, tensors, "statistics.")
                load_state(self.pattern, tensors, "pattern.")
            if ranks.decided(position.stage) == 2:
                self.begin_second()
                if ranks.is_first():
                    load_state(self.strips, tensors, "strips.")
                    load_state(self.further, tensors, "further.")
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(one_line(f"{file} cannot be resumed ({error}): run without --resume")) from error
        self.done, self.seconds = ranks.decided(position.done), position.seconds

    @ranks.by_first
    def forget(self) -> None:
        """Delete the saved state."""
        shutil.rmtree(self._folder, ignore_errors=True)


def analyse(
    paths: list[Path],
    cfg: AnalysisConfig,
    resume: bool = False,
    device: str = "auto",
    wandb: Mode = "disabled",
    model: str | None = None,
    text: str | None = None,
) -> None:
    """Write `analysis/` of checkpoints; those of one model and text share every forward, also of several layers.

    Under torchrun the processes deal the forwards out, and the first one writes.

    Args:
        model, text: where those trained on lie now, if elsewhere than in training.

    Raises:
        ValueError: a checkpoint, its model or the text cannot be used.
        Interrupted: Ctrl-C or SIGTERM; what was done is saved.
    """
    with ranks.joined():
        _analyse(paths, cfg, resume or ranks.may_restart(), device, wandb, model, text)


def _analyse(
    paths: list[Path],
    cfg: AnalysisConfig,
    resume: bool,
    device: str,
    wandb: Mode,
    model: str | None,
    text: str | None,
) -> None:
    require(text is None or cfg.dataset is None, "--text is where the text trained on lies, --dataset another text")
    checkpoints = [Checkpoint(path) for path in paths]
    if cfg.summary:
        cfg = replace(cfg, examples=1, quantile_examples=0, score_tokens=0)
        for checkpoint in checkpoints:
            require(not _is_whole(checkpoint), f"{checkpoint.path}/analysis holds more than a summary: delete it first")
    if ranks.is_first():
        wandb = reachable(wandb)
        for path in paths:
            make_writable(path)
    for group in by_origin(checkpoints, model):
        lm = group[0].open_model(ranks.own_device(pick_device(device)), model)
        corpus = _another(cfg, group[0], lm) if cfg.dataset else group[0].open_text(lm.tokenizer, text)
        every = corpus.held_out_tokens(cfg.tokens + cfg.score_tokens)
        contexts = every[: corpus.n_contexts(cfg.tokens)]  # what follows was not used to write descriptions
        fuzzy_from = dfa.similarity_threshold(lm, contexts)
        key = {**asdict(cfg), "text": corpus.fingerprint, "n_contexts": len(contexts)}
        jobs = [Job(trained, lm.layer(trained.layer), key, cfg, corpus.context_size) for trained in group]
        for job in jobs:
            if resume:
                job.load()
            else:
                job.forget()
        for same in _equally_far(jobs, 1):
            _run_pass("First pass ", same, contexts, torch.arange(len(contexts)), fuzzy_from)
            for job in same:
                job.begin_second()
        further = torch.arange(len(contexts), len(every))
        for same in _equally_far(jobs, 2):
            needed = torch.cat([further, *(job.strips.contexts for job in same)]).unique()
            _run_pass("Second pass", same, every, needed)
        n_repeated, length = max(1, _REPEATED_TOKENS // (corpus.context_size - 1)), corpus.context_size
        layers = _by_layer(jobs)
        readers = {layer: [job.reader for job in same] for layer, same in layers.items()}
        repeated = sources_on_repeats(lm, readers, n_repeated, length, cfg.seed, fuzzy_from)
        for layer, same in layers.items():
            _write(same, *repeated[layer], corpus, every, fuzzy_from, cfg, wandb)


def _is_whole(trained: Checkpoint) -> bool:
    try:
        return not Analysis(trained).is_summary
    except CheckpointError:  # there is none, or it is of no use
        return False


def _another(cfg: AnalysisConfig, trained: Checkpoint, lm: LanguageModel) -> Corpus:
    """Another text than the one trained on, of which everything is read."""
    assert cfg.dataset is not None
    text = trained.config.text
    column = cfg.text_column or text.text_column
    return Corpus(cfg.dataset, lm.tokenizer, text.context_size, 1.0, column, cfg.dataset_config, cfg.dataset_split)


def _equally_far(jobs: list[Job], stage: int) -> list[list[Job]]:
    """Those in a pass, by where they stopped: jobs that are equally far share the forwards."""
    left = sorted((job for job in jobs if job.stage == stage), key=lambda job: job.done)
    return [list(same) for _, same in groupby(left, key=lambda job: job.done)]


def _by_layer(jobs: list[Job]) -> dict[int, list[Job]]:
    return {layer: [job for job in jobs if job.layer.index == layer] for layer in sorted({j.layer.index for j in jobs})}


def _run_pass(
    what: str,
    jobs: list[Job],
    contexts: Int[Tensor, "context pos"],
    needed: Int[Tensor, " needed"],
    fuzzy_from: float = 2.0,
) -> None:
    """Take jobs that are equally far through their pass, saving now and then, and before stopping.

    Args:
        needed: contexts that the whole pass reads.
        fuzzy_from: of `dfa.TokenKinds`.
    """
    lm, stage, n_tokens = jobs[0].layer.lm, jobs[0].stage, contexts.shape[1] - 1
    filled = {layer: [each for job in same for each in job.filled] for layer, same in _by_layer(jobs).items()}
    index = needed[needed >= jobs[0].done]
    n_read = len(needed) - len(index)
    before, started = jobs[0].seconds[stage - 1], time.monotonic()
    saved = started
    with (
        tqdm(desc=what, total=len(needed) * n_tokens, unit="tok", unit_scale=True, dynamic_ncols=True) as bar,
        deferred_interrupts() as asked_to_stop,
    ):
        bar.update(n_read * n_tokens)
        for read in feed(lm, contexts, index, filled, fuzzy_from):
            now = time.monotonic()
            n_read += len(read)
            bar.update(len(read) * n_tokens)
            for job in jobs:
                job.done, job.seconds[stage - 1] = int(read[-1]) + 1, before + now - started
            stop = ranks.any_of(asked_to_stop())
            if stop or ranks.any_of(now - saved > _SAVE_SECONDS):
                saved = now
                for job in jobs:
                    job.collect()
                    job.save()
            if stop:
                raise Interrupted(f"{what.strip().lower()}, {n_read:,} of {len(needed):,} contexts; --resume goes on")
    for job in jobs:
        job.collect()


@ranks.by_first
def _write(
    jobs: list[Job],
    repeats: list[Sources],
    on_repeats: MeanPattern,
    corpus: Corpus,
    every: Int[Tensor, "context pos"],
    fuzzy_from: float,
    cfg: AnalysisConfig,
    wandb: Mode,
) -> None:
    """The artefacts of jobs of one layer that went through both passes."""
    layer, length = jobs[0].layer, every.shape[1]
    contexts = every[: corpus.n_contexts(cfg.tokens)]
    copied = copying(layer, next(chunks(layer, contexts, torch.arange(min(32, len(contexts))))))
    scale = inverse_scale(layer, contexts[: max(1, _SCALE_TOKENS // length)])
    documents = corpus.documents(contexts)
    for job, sources in zip(jobs, repeats, strict=True):
        path = job.checkpoint.path
        print(f"Writing {path}/analysis", flush=True)
        tables, redundancy = _tables(job, sources, copied, every, documents, scale, fuzzy_from)
        meta = _meta(job, corpus, cfg) | {"inverse_scale": scale, "fuzzy_from": fuzzy_from}
        if redundancy is not None:
            tables["patterns"] = pattern_table(job.pattern, on_repeats)
            meta |= _details(tables["features"], redundancy)
            meta["patterns"] = {"text": job.pattern.described(), "repeated": on_repeats.described()}
        store.write(path / "analysis", schema.ANALYSIS_VERSION, meta, tables)
        job.forget()
        _track(path, meta, tables, wandb)


def _tables(
    job: Job,
    repeats: Sources,
    copied: list[Copying],
    every: Int[Tensor, "context pos"],
    documents: Int[Tensor, "analysed pos"],
    scale: float,
    fuzzy_from: float,
) -> tuple[dict[str, pd.DataFrame | pa.Table], Redundancy | None]:
    """Everything that is written, and the redundancy of which the tables hold parts; None in a summary."""
    layer, lm, sae, contexts = job.layer, job.layer.lm, job.reader.sae, every[: len(documents)]
    head, head_share = (column.numpy() for column in head_of_features(sae, layer.n_heads))
    directions = written(sae, layer.W_O)
    effects = logit_effects(lm, directions, scale)
    constants, head_share = job.reader.constants().cpu(), head_share.astype(np.float32)
    features = feature_table(job.statistics, repeats, effects, constants, head, head_share)
    heads = head_table(job.statistics, repeats, copied, job.checkpoint.eval, head)
    counts = np.bincount(contexts[:, 1:].flatten(), minlength=lm.d_vocab)  # BOS is not counted where it stands first
    redundancy, details = None, {}
    within, named = [job.examples["context"]], []  # contexts and token ids that the tables mention
    if job.is_summary:
        features = shortened(features, schema.summarised(schema.of_analysis(job.checkpoint)).tables["features"])
    else:
        redundancy = compare_features(job.statistics.cofiring, directions, head, lm.n_heads)
        pairs = pd.concat([of_head.examples for of_head in copied], ignore_index=True)
        n_further, length = len(every) - len(contexts), every.shape[1]
        detection = choose_detection(job.further, job.statistics.sample, n_further, length, job.seed)
        detection, scores = score_descriptions(features, detection, every, dfa.TokenKinds(lm, every, fuzzy_from))
        features = pd.concat([features, scores], axis=1)
        within += [pairs["context"], detection["context"]]
        named.append(np.flatnonzero(counts))
        details = {
            "copying": pairs,
            "detection": detection,
            "pairs": redundancy.neighbours,
            "merging": redundancy.merging,
            "counts": count_table(job.statistics),
        }
    shown = np.unique(np.concatenate(within))
    tokens = every[shown]
    named += [np.concatenate(table[c]) for table in (features, heads) for c in table if str(c).endswith("_ids")]
    ids = np.unique(np.concatenate([tokens.flatten(), *named]))
    ids = ids[ids >= 0]
    strings = dict(zip(ids.tolist(), lm.token_strings(ids.tolist()), strict=True))
    features["description"] = describe(features, strings)
    of_example = documents[tuple(job.examples[name].to_numpy(copy=True) for name in ("context", "position"))]
    return {
        "features": features,
        "examples": _examples(job.examples.assign(document=of_example.int().numpy()), job.strips),
        "contexts": pd.DataFrame({"context": shown.astype(np.int32), "token_ids": list(tokens.int().numpy())}),
        "heads": heads,
        "tokens": pd.DataFrame({"id": list(strings), "text": list(strings.values()), "count": counts[ids]}),
        **details,
    }, redundancy


def _examples(table: pd.DataFrame, strips: Strips) -> pa.Table:
    """The examples with their sparse rows as list columns."""
    examples = pa.Table.from_pandas(table, preserve_index=False)
    examples = examples.append_column("head", pa.array(strips.head.numpy()))
    examples = examples.append_column("dfa_sum", pa.array(strips.dfa_sum.numpy()))
    parts = state(strips)
    names = {
        "active": {"active_positions": "position", "activations": "value"},
        "source": {"source_positions": "position", "dfa": "dfa", "attention": "attention"},
    }
    for prefix, columns in names.items():
        example = parts[f"{prefix}_example"].long()
        order = example.argsort(stable=True)
        bounds = torch.bincount(example, minlength=len(table)).cumsum(0)
        offsets = torch.nn.functional.pad(bounds, (1, 0)).int().numpy()
        for column, name in columns.items():
            values = parts[f"{prefix}_{name}"][order].numpy()
            examples = examples.append_column(column, pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)))
    return examples


def _meta(job: Job, corpus: Corpus, cfg: AnalysisConfig) -> dict[str, Any]:
    statistics = job.statistics
    return {
        "summary": cfg.summary,
        "checkpoint": job.checkpoint.name,
        "weights": job.checkpoint.weights_hash,
        "model": asdict(job.checkpoint.config.model),
        "text": {
            "name": corpus.name,
            "fingerprint": corpus.fingerprint,
            "context_size": corpus.context_size,
            "held_out": cfg.dataset is None,
        },
        "n_tokens": int(statistics.n_tokens),
        "options": asdict(cfg),
        "L0": (statistics.l0.sum() / statistics.n_tokens).item(),
        "FVU": (statistics.error.sum() / statistics.deviation().sum()).item(),
        "token_counts_too_low_by": [int(statistics.fires_on.floor), int(statistics.sources.reads.floor)],
        "head_tokens": int(statistics.sources.head_tokens),
        "slots_by_chance": dict(zip(dfa.SLOTS, dfa.shares(statistics.sources.chance).tolist(), strict=True)),
        "descriptions": None,
        "redundancy": None,
        "seconds": {"first pass": job.seconds[0], "second pass": job.seconds[1]},
        "versions": checkpoint.versions(),
    }


def _details(features: pd.DataFrame, redundancy: Redundancy) -> dict[str, Any]:
    """What meta.json says beside the tables that a summary leaves out."""
    figures = features.filter(like="description_")
    described = {name.removeprefix("description_"): value for name, value in figures.mean().items()}
    return {
        "descriptions": {
            "features": int(figures["description_auroc"].notna().sum()),
            "quantile": QUANTILE,
            **{name: None if np.isnan(value) else value for name, value in described.items() if "_se" not in name},
        },
        "redundancy": {"l0": redundancy.l0, "heads": redundancy.heads, "n_tokens": redundancy.n_tokens},
    }


def _track(path: Path, meta: dict[str, Any], tables: dict[str, Any], mode: Mode) -> None:
    """The tables of heads, and of merging where there is one, as a W&B run."""
    heads = tables["heads"].drop(columns=[c for c in tables["heads"] if c.endswith(("deviants", "_ids", "_shares"))])
    tracked = Tracked(path, mode, project="attn-saes", job_type="analysis", config=meta)

    def log(run: Any) -> None:
        import wandb

        logged = {"heads": heads} | {name: tables[name] for name in ("merging",) if name in tables}
        run.log({name: wandb.Table(dataframe=table) for name, table in logged.items()})
        run.finish()

    tracked.send(log)
