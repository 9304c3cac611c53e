"""From checkpoints to their artefacts: both passes, then the tables; what is interrupted can be resumed."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from analysis import artefacts, dfa
from analysis.directions import head_of_features, inverse_final_scale, logit_effects, written
from analysis.features import describe, feature_table
from analysis.heads import Copying, copying, head_table
from analysis.pairs import compare_features
from analysis.passes import (
    Strips,
    choose_examples,
    chunks,
    example_contexts,
    first_pass,
    second_pass,
    sources_on_repeats,
)
from analysis.statistics import FeatureStatistics, Sources, load_state, state
from trainer import checkpoint
from trainer.interrupts import Interrupted, deferred_interrupts
from trainer.lm import LanguageModel, pick_device
from trainer.origin import Trained, load_by_origin, open_model, open_text
from trainer.text import Corpus

_SAVE_SECONDS = 120  # between two saves of the state
_REPEATED_TOKENS = 4096  # random ones, repeated once, on which roles are scored
_SCALE_TOKENS = 2048  # that run through the whole model, for the scale of the final norm


@dataclass(frozen=True)
class AnalysisConfig:
    """What an analysis looks at."""

    tokens: int = 100_000
    """Tokens of text; fewer where the text has fewer."""
    dataset: str | None = None
    """Another text than the held-out documents of the one trained on: all of a file or data set."""
    examples: int = 20
    """Contexts kept of each feature in which it fires most."""
    quantile_examples: int = 10
    """Firings kept of each feature over the quantiles of its activations."""
    seed: int = 0
    """Of the repeated random tokens."""

    def __post_init__(self) -> None:
        for key in ("tokens", "examples"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if not 0 <= self.quantile_examples <= 50:
            raise ValueError(f"quantile_examples must lie between 0 and 50, got {self.quantile_examples}")


class Job:
    """The analysis of one checkpoint on its way: `stage` 1 or 2, and how many contexts of it are done."""

    def __init__(self, trained: Trained, lm: LanguageModel, key: dict[str, Any], n_top: int) -> None:
        self.path, self.config = trained.path, trained.config
        self.sae = trained.sae.to(lm.device)
        self.stage, self.done, self.seconds = 1, 0, [0.0, 0.0]
        self._key = {**key, "weights": artefacts.weights_hash(trained.path)}
        b_V = lm.value_bias(self.config["model"]["hook_layer"])
        self.statistics = FeatureStatistics(self.sae, b_V, lm.d_vocab, n_top)
        self.examples: pd.DataFrame | None = None
        self.strips: Strips | None = None

    def begin_second(self, n_quantiles: int, length: int) -> None:
        """Choose the examples whose strips the second pass fills."""
        self.examples = choose_examples(self.statistics, n_quantiles, length)
        self.strips = Strips(len(self.examples))
        self.stage, self.done = 2, 0

    def save(self) -> None:
        """Write what resuming needs, beside the checkpoint's own files."""
        self._folder.mkdir(exist_ok=True)
        found = state(self.statistics, "statistics.")
        if self.strips is not None:
            found |= state(self.strips, "strips.")
        found = {name: value.contiguous() for name, value in found.items()}
        checkpoint.write_atomically(self._folder / "state.safetensors", lambda p: save_file(found, p, self._position()))

    def load(self, n_quantiles: int, length: int) -> None:
        """Go on from what `save` wrote, if it belongs to the same analysis.

        Raises:
            ValueError: it was begun with other options, or the file is damaged.
        """
        file = self._folder / "state.safetensors"
        if not file.exists():
            return
        try:
            found = load_file(file)
            with file.open("rb") as raw:
                size = int.from_bytes(raw.read(8), "little")
                position = json.loads(raw.read(size))["__metadata__"]
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}): run without --resume") from error
        if json.loads(position["key"]) != self._key:
            raise ValueError(f"{file} was begun with other options, text or weights: run without --resume")
        load_state(self.statistics, found, "statistics.")
        if position["stage"] == "2":
            self.begin_second(n_quantiles, length)
            load_state(self.strips, found, "strips.")
        self.done, self.seconds = int(position["done"]), json.loads(position["seconds"])

    def forget(self) -> None:
        """Delete the saved state."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _position(self) -> dict[str, str]:
        return {
            "key": json.dumps(self._key),
            "stage": str(self.stage),
            "done": str(self.done),
            "seconds": json.dumps(self.seconds),
        }

    @property
    def _folder(self) -> Path:
        return self.path / ".analysis.state"


def analyse(
    paths: list[Path], cfg: AnalysisConfig, resume: bool = False, device: str = "auto", wandb: str = "disabled"
) -> None:
    """Write `analysis/` of checkpoints; those of one layer, model and text share every forward.

    Raises:
        ValueError: a checkpoint, its model or the text cannot be used.
        Interrupted: Ctrl-C or SIGTERM; what was done is saved.
    """
    for group in load_by_origin(paths):
        first = group[0].config
        lm = open_model(first, pick_device(device))
        text = first["text"] | ({"name": cfg.dataset, "held_out_fraction": 1.0} if cfg.dataset else {})
        corpus = open_text(text, lm.tokenizer)
        contexts = corpus.held_out_tokens(cfg.tokens)
        key = {**asdict(cfg), "text": corpus.fingerprint, "n_contexts": len(contexts)}
        jobs = [Job(each, lm, key, cfg.examples) for each in group]
        for job in jobs:
            if resume:
                job.load(cfg.quantile_examples, corpus.context_size)
            else:
                job.forget()
        _run(jobs, lm, corpus, contexts, cfg, wandb)


def _run(
    jobs: list[Job],
    lm: LanguageModel,
    corpus: Corpus,
    contexts: Int[Tensor, "context pos"],
    cfg: AnalysisConfig,
    wandb: str,
) -> None:
    layer, length = jobs[0].config["model"]["hook_layer"], contexts.shape[1]
    # Jobs that stopped at different contexts catch up first: those that are equally far share the forwards.
    for start, same in _by_progress(jobs, 1):
        run = partial(first_pass, lm, layer, contexts, start, [job.statistics for job in same])
        _follow("First pass ", run, same, len(contexts), length)
        for job in same:
            job.begin_second(cfg.quantile_examples, length)
    for start, same in _by_progress(jobs, 2):
        examples = [job.examples for job in same]
        run = partial(
            second_pass, lm, layer, contexts, start, [j.sae for j in same], examples, [j.strips for j in same]
        )
        _follow("Second pass", run, same, len(example_contexts(examples)), length)

    n_repeated = max(1, _REPEATED_TOKENS // (length - 1))
    repeats = sources_on_repeats(lm, layer, [job.sae for job in jobs], n_repeated, length, cfg.seed)
    copied = copying(lm, layer, next(chunks(lm, layer, contexts, torch.arange(min(32, len(contexts))))))
    inverse_scale = inverse_final_scale(lm, layer, contexts[: max(1, _SCALE_TOKENS // length)])
    documents = corpus.documents(contexts)
    for job, sources in zip(jobs, repeats, strict=True):
        print(f"Writing {job.path}/analysis", flush=True)
        tables, redundancy = _tables(job, lm, sources, copied, contexts, documents, inverse_scale)
        meta = _meta(job, corpus, cfg, redundancy) | {"inverse_final_scale": inverse_scale}
        artefacts.write(job.path / "analysis", meta, tables)
        job.forget()
        if wandb != "disabled":
            _log(job.path.name, meta, tables, wandb)


def _by_progress(jobs: list[Job], stage: int) -> list[tuple[int, list[Job]]]:
    left = sorted((job for job in jobs if job.stage == stage), key=lambda job: job.done)
    return [(done, list(same)) for done, same in groupby(left, key=lambda job: job.done)]


def _follow(what: str, run: Callable[[Callable[[int], None]], None], jobs: list[Job], total: int, length: int) -> None:
    """Run a pass with a progress bar, saving now and then, and before stopping."""
    started = saved = time.monotonic()
    before = jobs[0].seconds[jobs[0].stage - 1]

    def save() -> None:
        for job in jobs:
            job.save()

    with (
        tqdm(desc=what, total=total * (length - 1), unit="tok", unit_scale=True, dynamic_ncols=True) as bar,
        deferred_interrupts() as asked_to_stop,
    ):
        bar.update(jobs[0].done * (length - 1))

        def after_forward(done: int) -> None:
            nonlocal saved
            bar.update((done - jobs[0].done) * (length - 1))
            for job in jobs:
                job.done = done
                job.seconds[job.stage - 1] = before + time.monotonic() - started
            if asked_to_stop():
                save()
                raise Interrupted(f"{what.strip().lower()}, {done:,} of {total:,} contexts; --resume goes on")
            if time.monotonic() - saved > _SAVE_SECONDS:
                save()
                saved = time.monotonic()

        run(after_forward)


def _tables(
    job: Job,
    lm: LanguageModel,
    repeats: Sources,
    copied: list[Copying],
    contexts: Int[Tensor, "context pos"],
    documents: Int[Tensor, "context pos"],
    inverse_scale: float,
) -> tuple[dict[str, pd.DataFrame | pa.Table], dict[str, Any]]:
    """Everything that is written, and the redundancy in total."""
    layer = job.config["model"]["hook_layer"]
    head, head_share = (each.numpy() for each in head_of_features(job.sae, lm.n_heads))
    directions = written(job.sae, lm.W_O(layer))
    redundancy = compare_features(job.statistics.cofiring, directions, head, lm.n_heads)
    effects = logit_effects(lm, directions, inverse_scale)
    W_enc = dfa.head_encoders(job.sae, lm.n_heads, lm.d_head)
    features = feature_table(
        job.statistics, repeats, effects, _constants(job, lm, W_enc), head, head_share.astype(np.float32)
    )
    pairs = pd.concat([each.examples for each in copied], ignore_index=True)
    shown = np.union1d(job.examples["context"], pairs["context"])
    tokens = contexts[shown]
    ids = np.unique(np.concatenate([tokens.flatten(), *(np.concatenate(features[c]) for c in features if "_ids" in c)]))
    ids = ids[ids >= 0]
    strings = dict(zip(ids.tolist(), lm.token_strings(ids.tolist()), strict=True))
    features["description"] = describe(features, strings)
    of_example = documents[tuple(job.examples[name].to_numpy(copy=True) for name in ("context", "position"))]
    return {
        "features": features,
        "examples": _examples(job.examples.assign(document=of_example.int().numpy()), job.strips),
        "contexts": pd.DataFrame({"context": shown.astype(np.int32), "token_ids": list(tokens.int().numpy())}),
        "heads": head_table(job.statistics, repeats, copied, checkpoint.load_eval(job.path), head),
        "copying": pairs,
        "pairs": redundancy.neighbours,
        "merging": redundancy.merging,
        "tokens": pd.DataFrame({"id": list(strings), "text": list(strings.values())}),
    }, {"l0": redundancy.l0, "heads": redundancy.heads, "n_tokens": redundancy.n_tokens}


def _constants(job: Job, lm: LanguageModel, W_enc: Tensor) -> Tensor:
    """b_V . w + b_enc of every feature."""
    b_V = lm.value_bias(job.config["model"]["hook_layer"]).float()
    constants = dfa.constants(b_V, W_enc, torch.zeros_like(W_enc[:, 0]))
    if job.sae.n_heads != lm.n_heads:
        constants = constants.sum(0, keepdim=True)
    return (constants + job.sae.b_enc).flatten().detach().cpu()


def _examples(table: pd.DataFrame, strips: Strips) -> pa.Table:
    """The examples with their sparse rows as list columns."""
    found = pa.Table.from_pandas(table, preserve_index=False)
    found = found.append_column("head", pa.array(strips.head.numpy()))
    found = found.append_column("dfa_sum", pa.array(strips.dfa_sum.numpy()))
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
            found = found.append_column(column, pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)))
    return found


def _meta(job: Job, corpus: Corpus, cfg: AnalysisConfig, redundancy: dict[str, Any]) -> dict[str, Any]:
    statistics = job.statistics
    return {
        "checkpoint": job.path.name,
        "weights": artefacts.weights_hash(job.path),
        "model": job.config["model"],
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
        "redundancy": redundancy,
        "seconds": {"first pass": job.seconds[0], "second pass": job.seconds[1]},
        "versions": checkpoint.versions(),
    }


def _log(name: str, meta: dict[str, Any], tables: dict[str, Any], mode: str) -> None:
    """The tables of heads and of merging as a W&B run."""
    import wandb

    run = wandb.init(project="attn-saes", name=name, job_type="analysis", config=meta, mode=mode)
    heads = tables["heads"].drop(columns=[c for c in tables["heads"] if c.endswith("deviants")])
    run.log({"heads": wandb.Table(dataframe=heads), "merging": wandb.Table(dataframe=tables["merging"])})
    run.finish()
