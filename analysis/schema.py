"""What the files of an analysis and of a match must hold to be drawn: columns, their types, and where their ids lie."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.attribution import SLOTS
from trainer.checkpoint import Checkpoint
from trainer.config import require
from trainer.figures import Count, NotNegative, Positive
from trainer.files import require_file

ANALYSIS_VERSION = 2  # 1 had seven source slots and no counts of tokens
MATCH_VERSION = 1
PATTERN_CELLS = 64  # rows and columns of a head's mean attention pattern at most
# What a table may unpack to: those of 13 SAEs unpack 5-fold, dead features 150-fold, a bomb a million-fold.
_UNPACKED = 16  # bytes for each of its file
_OF_A_PART = 4096  # and bytes for each feature, whose weights are there, or head of a model
_BOTH = ("", "repeated_")  # on text, and on repeated random tokens
_MAY_BE_NONE = {"fires_on_ids", "reads_ids", "nearest", "partner", "document", "query_ids", "key_ids"}  # -1
Columns = dict[str, str]


@dataclass(frozen=True)
class Redundancy:
    """Of `AnalysisMeta`."""

    l0: NotNegative
    heads: list[list[Count]]
    n_tokens: Count

    def __post_init__(self) -> None:
        require(all(len(row) == len(self.heads) for row in self.heads), "heads is no square")


@dataclass(frozen=True)
class Descriptions:
    """Of `AnalysisMeta`: means over the features whose descriptions were scored; None where none was."""

    features: Count
    quantile: NotNegative
    accuracy: NotNegative | None
    accuracy_shuffled: NotNegative | None
    auroc: NotNegative | None
    auroc_shuffled: NotNegative | None


@dataclass(frozen=True)
class MeanPatternMeta:
    """Of `AnalysisMeta`: how many contexts a mean attention pattern is of, its rows, and the positions in one of them.

    The first row and column are BOS alone.
    """

    contexts: Positive
    cells: Annotated[int, msgspec.Meta(ge=1, le=PATTERN_CELLS)]
    step: Positive


@dataclass(frozen=True)
class Patterns:
    """Of `AnalysisMeta`: on text, and on repeated random tokens."""

    text: MeanPatternMeta
    repeated: MeanPatternMeta


@dataclass(frozen=True)
class AnalysisMeta:
    """meta.json of an analysis: what of it is shown."""

    schema_version: int
    weights: str
    n_tokens: Positive
    head_tokens: Count
    redundancy: Redundancy | None
    """None in summaries"""
    fuzzy_from: float
    slots_by_chance: dict[str, NotNegative]
    descriptions: Descriptions | None
    """None in summaries"""
    patterns: Patterns | None = None
    """None in summaries, and in analyses that were made before there were any"""
    summary: bool = False
    """whether it holds only what `summarised` says"""

    def __post_init__(self) -> None:
        require(self.summary or None not in (self.redundancy, self.descriptions), "no redundancy or descriptions")


@dataclass(frozen=True)
class MatchMeta:
    """meta.json of a match: what of it is shown."""

    schema_version: int
    weights: Annotated[list[str], msgspec.Meta(min_length=2, max_length=2)]
    kind: Literal["one-to-one", "split"]
    greedy: bool
    threshold: float
    min_firings: Count
    n_tokens: Positive


@dataclass(frozen=True)
class Expected:
    """What a folder must hold.

    Kinds of columns: int, float, str, bool, bytes, and lists of the first two; with a question mark cells may be empty.
    """

    meta: type
    version: int
    tables: dict[str, Columns]
    below: dict[str, int]
    """ids in the columns of these names are smaller"""
    rows: dict[str, int]
    """of tables that have a row per feature or head"""
    parts: int
    """features, or heads, of which the tables are"""
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    """within which the numbers in the columns of these names lie, where there are any"""


def columns(**of_kind: str) -> Columns:
    """Of a table: the kind of each column, from names divided by spaces for each kind."""
    kinds = {"ints": "list int", "floats": "list float", "maybe_str": "str?", "maybe_floats": "list float?"}
    return {name: kinds.get(kind, kind) for kind, names in of_kind.items() for name in names.split()}


def each(names: str, prefixes: tuple[str, ...] = _BOTH) -> str:
    """Names with each of the prefixes."""
    return " ".join(prefix + name for prefix in prefixes for name in names.split())


_ROLES = each("role_attention role_dfa role_attention_besides_bos mono_role")
_INTERVALS = "mono_share mono_low mono_high mono_weighted mono_weighted_low mono_weighted_high"
_DFA, _ATTENTION = (" ".join(f"{what}_{slot}" for slot in SLOTS) for what in ("dfa", "attention"))
_ANALYSIS = {
    "features": columns(
        int=f"feature head firings {each('dfa_firings')}",
        float="head_share density mean_activation max_activation constant histogram_end "
        + each(f"role_share {_DFA}")
        + " description_accuracy description_accuracy_se description_accuracy_shuffled"
        " description_auroc description_auroc_se description_auroc_shuffled",
        str="description",
        maybe_str=each("role"),
        bool=each("near_tie"),
        ints="histogram fires_on_ids fires_on_counts reads_ids reads_counts top_logit_ids bottom_logit_ids "
        "logit_histogram",
        floats="top_logits bottom_logits",
    ),
    "examples": columns(
        int="feature rank context position document head",
        float="quantile activation dfa_sum",
        str="kind",
        ints="active_positions source_positions",
        floats="activations dfa attention",
    ),
    "contexts": columns(int="context", ints="token_ids"),
    "heads": columns(
        int=f"head features dead {each('mono_n')}",
        float="L0 L0_share MSE FVU explained_share KL_score KL_share copying copying_se copying_top10 copying_bottom10 "
        + each(f"{_ATTENTION} {_DFA} entropy maximum distance {_INTERVALS}"),
        maybe_str=_ROLES,
        str=each("mono_verdict"),
        bool=each("agree mono_unclassified mono_near_tie"),
        ints="query_ids key_ids " + each("mono_deviants"),
        floats="query_shares key_shares",
    ),
    "patterns": columns(int="head", bytes="text repeated"),
    "copying": columns(int="head context query source rank", float="attention"),
    "pairs": columns(int="feature other", bool="across", float="jaccard correlation cosine"),
    "merging": columns(str="criterion", float="threshold L0", int="clusters largest"),
    "detection": columns(int="feature context position", bool="fires", float="score shuffled"),
    "counts": columns(int="token feature firings reads"),
    "tokens": columns(int="id count", str="text"),
}
# What a summary leaves out.
_DETAILS = {"patterns", "copying", "pairs", "merging", "detection", "counts"}
_DETAILS_OF_FEATURES = {
    *("histogram", "histogram_end", "logit_histogram", "bottom_logit_ids", "bottom_logits"),
    *each(_DFA).split(),
    *(name for name in _ANALYSIS["features"] if name.startswith("description_")),
}
_ONE_TO_ONE = {
    "pairs": columns(int="a b head", float="cosine jaccard score"),
    "features": columns(str="side", int="feature head firings nearest partner", float="nearest_score"),
}
_SPLIT = {
    "pairs": columns(int="a b head", float="cosine b_given_a a_given_b norm_share score"),
    "features": columns(
        str="side", int="feature head firings parts", float="covered chance", maybe_floats="norm_shares"
    ),
}


def of_analysis(checkpoint: Checkpoint) -> Expected:
    """Of `checkpoints/<name>/analysis`."""
    n_features, n_heads = checkpoint.config.sae.d_sae, checkpoint.n_heads
    below = {"head": n_heads, **dict.fromkeys(("feature", "other", *each("mono_deviants").split()), n_features)}
    rows = {"features": n_features, "heads": n_heads, "patterns": n_heads}
    return Expected(AnalysisMeta, ANALYSIS_VERSION, _ANALYSIS, below, rows, n_features)


def summarised(whole: Expected) -> Expected:
    """Of the folder of an analysis that `python -m analysis --summary` wrote."""
    tables = {name: kinds for name, kinds in whole.tables.items() if name not in _DETAILS}
    kept = {name: kind for name, kind in tables["features"].items() if name not in _DETAILS_OF_FEATURES}
    return replace(whole, tables={**tables, "features": kept})


def of_match(a: Checkpoint, b: Checkpoint) -> Expected:
    """Of `checkpoints/<a>/matches/<b>`."""
    sizes = a.config.sae.d_sae, b.config.sae.d_sae
    below = {"head": a.n_heads, "a": sizes[0], "b": sizes[1]}
    below |= dict.fromkeys(("feature", "nearest", "partner"), max(sizes))
    tables = _ONE_TO_ONE if a.is_dense == b.is_dense else _SPLIT
    return Expected(MatchMeta, MATCH_VERSION, tables, below, {}, max(sizes))


def check_file(file: Path, name: str, expected: Expected) -> None:
    """Check what a parquet file says of itself, before any of it is unpacked.

    Raises:
        OSError: it is missing, or no file.
        ValueError: its columns are others, it has other rows, or it would unpack to far more than it is.
    """
    size = require_file(file).st_size
    metadata = pq.read_metadata(file)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
    unpacked = max(values * 8, sum(group.total_byte_size for group in groups))
    most = size * _UNPACKED + expected.parts * _OF_A_PART
    require(unpacked <= most, f"{size:,} bytes that unpack to {values:,} values")
    rows = expected.rows.get(name, metadata.num_rows)
    require(metadata.num_rows == rows, f"{metadata.num_rows:,} rows, not {rows:,}")
    schema = metadata.schema.to_arrow_schema()
    for column, kind in expected.tables[name].items():
        require(column in schema.names, f"no column {column}")
        found = schema.field(column).type
        # without rows a writer cannot know the type
        require(not metadata.num_rows or _is(kind.rstrip("?"), found), f"column {column} is {found}, not {kind}")


def check_values(table: pa.Table, name: str, expected: Expected) -> pa.Table:
    """The table, if no cell is empty that may not be, ids and numbers lie where they can, and roles are source slots.

    Raises:
        ValueError: they do not.
    """
    for column, kind in expected.tables[name].items():
        if column not in table.column_names:
            continue
        cells = table[column]
        require("?" in kind or kind in ("float", "bool") or not cells.null_count, f"column {column} has empty cells")
        if "list" in kind:
            cells = pc.list_flatten(cells)
        if "int" in kind and len(cells):
            require(not cells.null_count, f"column {column} has empty cells")
            span, below = pc.min_max(cells).as_py(), expected.below.get(column, 2**53)
            first = -1 if column in _MAY_BE_NONE else 0
            require(first <= span["min"] and span["max"] < below, f"column {column} has {span['min']} to {span['max']}")
        if column in expected.spans:
            values, (low, high) = np.array(cells.to_pylist(), float), expected.spans[column]
            outside = values[(values < low) | (values > high)]  # nan is not
            require(not len(outside), f"column {column} has {outside[:1]}")
        if column in ("role", "repeated_role", *_ROLES.split()):
            require(set(pc.unique(cells).to_pylist()) <= {None, *SLOTS}, f"column {column} has what is no source slot")
    return table


def _is(kind: str, found: pa.DataType) -> bool:
    """Whether a column can hold what is expected; one without a single value has the type null."""
    if kind.startswith("list "):
        return (pa.types.is_list(found) or pa.types.is_large_list(found)) and _is(kind[5:], found.value_type)
    if kind == "float":
        return pa.types.is_floating(found) or pa.types.is_integer(found) or pa.types.is_null(found)
    of_kind: dict[str, Any] = {"int": pa.types.is_integer, "bool": pa.types.is_boolean, "bytes": pa.types.is_binary}
    is_text = pa.types.is_string(found) or pa.types.is_large_string(found)
    return pa.types.is_null(found) or (is_text if kind == "str" else of_kind[kind](found))
