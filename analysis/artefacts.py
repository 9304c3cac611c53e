"""The files in `checkpoints/<name>/analysis/`: columnar, sorted by feature, read a feature at a time.

meta.json          text, tokens, model, versions, options, redundancy in total
features.parquet   a row per feature: activations, sources, tokens, logit effects, description
examples.parquet   a row per example: where it is, and its activations, DFA and attention as sparse rows
contexts.parquet   a row per context that an example or a copying pair lies in: token ids
heads.parquet      a row per head: role card and monosemanticity sheet
copying.parquet    pairs behind the copying scores
pairs.parquet      neighbours of features
merging.parquet    L0 after merging
tokens.parquet     the text of every token id that the other files mention
"""

import hashlib
import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.checkpoint import CheckpointError, write_json

SCHEMA_VERSION = 1
_ROW_GROUP = {"features": 256, "examples": 2048, "contexts": 256, "pairs": 4096}


def write(folder: Path, meta: dict[str, Any], tables: dict[str, pd.DataFrame | pa.Table]) -> None:
    """Put all artefacts in place of those that are there, in one step.

    Args:
        folder: `checkpoints/<name>/analysis`.
        tables: by file name without ending.
    """
    new, old = (folder.with_name(f".{folder.name}.{what}") for what in ("new", "old"))
    for each in (new, old):
        shutil.rmtree(each, ignore_errors=True)
    new.mkdir(parents=True)
    for name, table in tables.items():
        if isinstance(table, pd.DataFrame):
            table = pa.Table.from_pandas(table, preserve_index=False)
        size = _ROW_GROUP.get(name, 2**16)
        pq.write_table(table, new / f"{name}.parquet", compression="zstd", row_group_size=size)
    write_json(new / "meta.json", {"schema_version": SCHEMA_VERSION, **meta})
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def weights_hash(checkpoint: Path) -> str:
    """What ties an analysis to the weights that it describes."""
    return hashlib.sha256((checkpoint / "sae.safetensors").read_bytes()).hexdigest()[:16]


class Analysis:
    """Reads the artefacts of one checkpoint; only what is asked for is read.

    Args:
        checkpoint: the checkpoint directory.

    Raises:
        CheckpointError: there is no analysis, it is of another schema version or of other weights, or a file is
            missing.
    """

    def __init__(self, checkpoint: Path | str) -> None:
        self.folder = Path(checkpoint) / "analysis"
        file = self.folder / "meta.json"
        try:
            self.meta = json.loads(file.read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{checkpoint} has no analysis yet: run `python -m analysis {checkpoint}`") from None
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
        if self.meta.get("schema_version") != SCHEMA_VERSION:
            found = self.meta.get("schema_version")
            raise CheckpointError(f"{file} has schema version {found}, this program reads {SCHEMA_VERSION}")
        if self.meta["weights"] != weights_hash(Path(checkpoint)):
            raise CheckpointError(
                f"{self.folder} describes other weights than the checkpoint has: run `python -m analysis {checkpoint}`"
            )

    @cached_property
    def features(self) -> pd.DataFrame:
        """Every feature, without the columns that hold lists; the index is the feature id."""
        scalar = [f.name for f in pq.read_schema(self._file("features")) if not pa.types.is_list(f.type)]
        return self.table("features", columns=scalar).set_index("feature", drop=False)

    @cached_property
    def heads(self) -> pd.DataFrame:
        """One row per head."""
        return self.table("heads")

    @cached_property
    def copying(self) -> pd.DataFrame:
        """The pairs behind the copying scores: head, context, query, source, attention, rank."""
        return self.table("copying")

    @cached_property
    def merging(self) -> pd.DataFrame:
        """criterion, threshold, L0, clusters, largest."""
        return self.table("merging")

    @cached_property
    def strings(self) -> dict[int, str]:
        """Text of token ids."""
        table = self.table("tokens")
        return dict(zip(table["id"], table["text"], strict=True))

    def table(self, name: str, **options: Any) -> pd.DataFrame:
        """One of the files whole, or in part by options of `pyarrow.parquet.read_table`.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        file = self._file(name)
        try:
            return pq.read_table(file, **options).to_pandas()
        except (pa.ArrowInvalid, OSError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error

    def feature(self, feature: int) -> pd.Series:
        """One feature with its lists.

        Raises:
            ValueError: there is no such feature.
        """
        found = self._of_feature("features", feature)
        if found.empty:
            raise ValueError(f"there is no feature {feature}: ids run from 0 to {len(self.features) - 1}")
        return found.iloc[0]

    def examples(self, feature: int) -> pd.DataFrame:
        """Its examples, the `top` ones first, with `token_ids`; activations, dfa and attention along the context."""
        found = self._of_feature("examples", feature)
        contexts = self.contexts(found["context"].unique().tolist())
        found["token_ids"] = found["context"].map(contexts)
        rows = {"activations": "active_positions", "dfa": "source_positions", "attention": "source_positions"}
        for column, positions in rows.items():
            length = found["token_ids"].map(len)
            found[column] = [_dense(*each) for each in zip(length, found[positions], found[column], strict=True)]
        return found.drop(columns=["active_positions", "source_positions"])

    def contexts(self, ids: list[int]) -> dict[int, np.ndarray]:
        """Token ids of contexts, BOS first."""
        if not ids:
            return {}
        found = self.table("contexts", filters=[("context", "in", ids)])
        return dict(zip(found["context"], found["token_ids"], strict=True))

    def neighbours(self, feature: int) -> pd.DataFrame:
        """The nearest features by Jaccard of firing or by cosine of what they write."""
        return self._of_feature("pairs", feature).drop(columns="feature")

    def search(
        self,
        fires_on: str | None = None,
        reads: str | None = None,
        promotes: str | None = None,
        role: str | None = None,
        head: int | None = None,
        density: tuple[float, float] | None = None,
    ) -> pd.DataFrame:
        """Live features that satisfy all conditions; rows of `features`, the most frequent first.

        A token is given as its text; white space around it and case do not matter. It is looked for among the ten
        tokens that a feature fires on, reads or promotes most. `role` is the largest source slot on text.
        """
        table = self.features
        keep = (table["firings"] > 0).to_numpy(copy=True)  # pandas 3 lends it read-only
        for token, column in ((fires_on, "fires_on_ids"), (reads, "reads_ids"), (promotes, "top_logit_ids")):
            if token:
                wanted = [i for i, text in self.strings.items() if text.strip().lower() == token.strip().lower()]
                keep &= np.isin(self._lists[column], wanted).any(1)
        if role:
            keep &= (table["role"] == role).to_numpy()
        if head is not None:
            keep &= (table["head"] == head).to_numpy()
        if density:
            keep &= table["density"].between(*density).to_numpy()
        return table[keep].sort_values("firings", ascending=False, kind="stable")

    @cached_property
    def _lists(self) -> dict[str, np.ndarray]:
        columns = ["fires_on_ids", "reads_ids", "top_logit_ids"]
        table = pq.read_table(self._file("features"), columns=columns)
        return {name: table[name].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1) for name in columns}

    def _file(self, name: str) -> Path:
        file = self.folder / f"{name}.parquet"
        if not file.exists():
            raise CheckpointError(f"{file} is missing: run the analysis again")
        return file

    def _of_feature(self, name: str, feature: int) -> pd.DataFrame:
        """Rows of a feature, from the row groups that hold it: a filter of pyarrow's would take ten times as long."""
        file, first, last = self._row_groups[name]
        groups = np.flatnonzero((first <= feature) & (feature <= last)).tolist()
        try:
            found = file.read_row_groups(groups, use_threads=False)
            return found.filter(pc.equal(found["feature"], feature)).to_pandas()
        except (pa.ArrowInvalid, OSError) as error:
            raise CheckpointError(f"{self._file(name)} is damaged: {error}") from error

    @cached_property
    def _row_groups(self) -> dict[str, tuple[pq.ParquetFile, np.ndarray, np.ndarray]]:
        """The files sorted by feature, with the first and last feature of each row group."""
        found = {}
        for name in ("features", "examples", "pairs"):
            try:
                file = pq.ParquetFile(self._file(name), memory_map=True)
            except (pa.ArrowInvalid, OSError) as error:
                raise CheckpointError(f"{self._file(name)} is damaged: {error}") from error
            column = file.schema_arrow.get_field_index("feature")
            groups = [file.metadata.row_group(i).column(column).statistics for i in range(file.num_row_groups)]
            found[name] = file, np.array([g.min for g in groups]), np.array([g.max for g in groups])
        return found


def _dense(length: int, positions: np.ndarray, values: np.ndarray) -> np.ndarray:
    row = np.zeros(length, dtype=np.float32)
    row[positions] = values
    return row
