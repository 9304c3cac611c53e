"""The folder `<out>/<model>.heads/` that `python -m analysis.heads` writes, as it is read.

meta.json         model, text, numbers of tokens, contexts and documents, options, versions
heads.parquet     a row per layer and head, sorted: attention by source slot, scores, roles, what removing it costs
patterns.parquet  a row per layer and head: its mean attention pattern on text and on repeated tokens
tokens.parquet    the text of the token ids in heads.parquet
"""

import os
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.attribution import SLOTS
from analysis.picture import Picture
from analysis.schema import Expected, Patterns, columns, each
from analysis.store import Artefacts, Strings, pictures, read_meta
from trainer.checkpoint import HEADS, CheckpointError
from trainer.config import require
from trainer.figures import Count, NotNegative, Positive

VERSION = 1
SCORES = {"previous": "previous-token", "induction": "induction", "duplicate": "duplicate-token"}
"""slots whose attention on repeated random tokens is a score, and what heads that have a high one are called"""
ABLATIONS = ("zero", "mean", "resample")  # of a head, on text; on repeated tokens the first
_ROUNDING = 1e-4
_FINITE = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ModelMeta:
    """The language model, as `trainer.checkpoint.Model` has it, of all layers."""

    name: str
    fingerprint: str
    n_layers: Positive
    n_heads: Positive
    d_head: Positive
    dtype: str
    processing: dict[str, bool]


@dataclass(frozen=True)
class TextMeta:
    """What was read of a text."""

    name: str
    fingerprint: str
    context_size: Positive


@dataclass(frozen=True)
class RemovalMeta:
    """On how much heads were removed, and the clean loss there (nats) with its error."""

    tokens: Positive
    contexts: Positive
    documents: Count
    repeated_tokens: Positive
    """scored ones: of second halves"""
    CE_clean: NotNegative
    CE_clean_se: NotNegative
    CE_clean_repeated: NotNegative
    CE_clean_repeated_se: NotNegative


@dataclass(frozen=True)
class HeadsMeta:
    """meta.json: what of it is shown."""

    schema_version: int
    model: ModelMeta
    text: TextMeta
    n_tokens: Positive
    n_contexts: Positive
    n_documents: Count
    repeated_tokens: Positive
    """queries in second halves"""
    repeated_contexts: Positive
    fuzzy_from: float
    slots_by_chance: dict[str, NotNegative]
    repeated_slots_by_chance: dict[str, NotNegative]
    patterns: Patterns
    removal: RemovalMeta | None
    """None where it was left out"""


def expected(meta: dict[str, Any]) -> Expected:
    """What a folder with this meta.json must hold."""
    attention = " ".join(f"attention_{slot}" for slot in SLOTS)
    looks = each(f"{attention} entropy maximum distance") + " copying copying_top10 copying_bottom10"
    figures = each("CE KL", tuple(f"{way}_" for way in (*ABLATIONS, "repeated_zero"))) if meta["removal"] else ""
    names = f"{looks} {figures}".split()
    tables = {
        "heads": columns(
            int="layer head",
            float=" ".join(f"{name} {name}_se" for name in names),
            maybe_str=each("role_attention role_attention_besides_bos"),
            bool=each("near_tie"),
            ints="query_ids key_ids",
            floats="query_shares key_shares",
        ),
        "patterns": columns(int="layer head", bytes="text repeated"),
        "tokens": columns(int="id", str="text"),
    }
    spans = dict.fromkeys(names, (-_FINITE, _FINITE)) | {f"{name}_se": (0.0, _FINITE) for name in names}
    spans |= dict.fromkeys((*each(f"{attention} maximum").split(), "copying_top10", "copying_bottom10"), _upto(1))
    spans |= dict.fromkeys(("query_shares", "key_shares"), _upto(1)) | {"copying": (-1 - _ROUNDING, 1 + _ROUNDING)}
    length = meta["text"]["context_size"]
    spans |= dict.fromkeys(each("entropy").split(), _upto(np.log(length)))
    spans |= dict.fromkeys(each("distance").split(), _upto(length))
    spans |= {name: (-_ROUNDING, _FINITE) for name in names if name.endswith("_KL")}
    sizes = meta["model"]["n_layers"], meta["model"]["n_heads"]
    n = sizes[0] * sizes[1]
    below = {"layer": sizes[0], "head": sizes[1]}
    return Expected(HeadsMeta, VERSION, tables, below, {"heads": n, "patterns": n}, n, spans)


def _upto(largest: float) -> tuple[float, float]:
    return -_ROUNDING, largest + _ROUNDING


class ModelHeads:
    """What every attention head of a model does, as `python -m analysis.heads` wrote it.

    Raises:
        CheckpointError: the folder is not there, damaged, or of another schema version; also of whatever is read later.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        self.name = folder.name.removesuffix(HEADS)
        self._command = _command(self.name, folder)
        absent = f"{folder} does not describe the heads of a model yet"
        meta = read_meta(folder, HeadsMeta, VERSION, self._command, absent)
        self._command = _command(meta["model"]["name"], folder)
        self._files = Artefacts(folder, [], expected(meta), self._command, absent)
        self.folder, self.meta = folder, self._files.meta

    @property
    def n_layers(self) -> int:
        return self.meta["model"]["n_layers"]

    @property
    def n_heads(self) -> int:
        """Of a layer."""
        return self.meta["model"]["n_heads"]

    @cached_property
    def heads(self) -> pd.DataFrame:
        """One row per layer and head, sorted by them."""
        table = self._sorted("heads")
        with self._files.reading("heads"):
            missing = [name for name in table if "attention_" in name and table[name].isna().any()]
            missing = [name for name in missing if not name.endswith("_se") and "role" not in name]
            require(not missing, f"column {' '.join(missing[:1])} has empty cells")
        return table

    @cached_property
    def patterns(self) -> dict[str, list[Picture]]:
        """Mean attention on `text` and on `repeated` tokens, in the order of `heads`; as `store.Analysis.patterns`."""
        table = self._sorted("patterns")
        with self._files.reading("patterns"):
            return pictures(table, self.meta["patterns"])

    @cached_property
    def strings(self) -> dict[int, str]:
        """Text of token ids."""
        table = self._files.table("tokens").set_index("id")
        return Strings(self.folder / "tokens.parquet", self._command, table["text"].to_dict())

    def strongest(self, slot: str, n: int) -> pd.DataFrame:
        """The n heads that attend most to a slot of `SCORES` on repeated tokens: layer, head, score, se."""
        name = f"repeated_attention_{slot}"
        table = self.heads.nlargest(n, name)[["layer", "head", name, f"{name}_se"]]
        return table.set_axis(["layer", "head", "score", "se"], axis=1).reset_index(drop=True)

    def _sorted(self, name: str) -> pd.DataFrame:
        table = self._files.table(name)
        with self._files.reading(name):
            place = table["layer"] * self.n_heads + table["head"]
            require(bool((place == np.arange(len(table))).all()), "heads are not in their order")
        return table


class Listing(NamedTuple):
    """The models of a folder, by name."""

    readable: list[ModelHeads]
    errors: list[CheckpointError]
    """why the others cannot be used"""


def list_models(folder: Path | str) -> Listing:
    """Every directory of `folder` whose name ends in `.heads`; the tables of the readable ones are not read yet."""
    listing = Listing([], [])
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(HEADS) and not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return listing
    except OSError as error:
        return Listing([], [CheckpointError(f"{folder} cannot be read: {error.strerror}")])
    for path in (Path(folder) / name for name in names):
        if path.is_dir():
            try:
                listing.readable.append(ModelHeads(path))
            except CheckpointError as error:
                listing.errors.append(error)
    return listing


def folder_of(model: str, out: Path | str) -> Path:
    """Where the heads of a model are described."""
    return Path(out) / f"{Path(model).name}{HEADS}"


def _command(model: str, folder: Path) -> str:
    out = [] if folder.parent == Path("checkpoints") else [f"--out={folder.parent}"]
    return shlex.join(["python", "-m", "analysis.heads", model, *out])
