"""A circuit as plain data: from a target back to the features of heads that make it, what they read and why.

Every feature in the graph is taken apart exactly: its DFA over all sources and nodes (OV edges), and for its strongest
source the score that made its head look there, over nodes at the key (K edges) and at the query (Q edges). What is too
small for an edge of its own goes into one edge from the rest, so that the edges of a feature still sum to what they
take apart.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import pandas as pd

from analysis.prompt.circuit.looks import at_key, at_query
from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.circuit.parts import Parts
from analysis.prompt.circuit.reads import upstream
from analysis.prompt.circuit.target import Number, Target
from trainer.config import require
from trainer.files import flaw, read_json

VERSION = 1
_NODE = ["kind", "layer", "head", "feature", "position"]


@dataclass(frozen=True)
class Node:
    """A node of the graph; ids are -1 where it has none."""

    kind: str
    """one of `parts.KINDS`; `group` of nodes that are drawn as one (`group.grouped`)"""
    layer: int
    head: int
    feature: int
    position: int
    activation: float | None = None
    """of a feature"""
    attribution: float | None = None
    """to the target, at first order; of features, errors and biases"""
    effect: float | None = None
    """what the target loses without it, with all that follows running on; of the strongest"""
    direct: float | None = None
    """of it what goes straight to the logits"""
    name: str = ""
    """of a group"""
    members: list[int] = field(default_factory=list)
    """of a group: indices of its nodes before they were one"""


@dataclass(frozen=True)
class Edge:
    """What a node gives to another one."""

    writer: int | None
    """index into `Circuit.nodes`; None is the rest: all that is too small"""
    reader: int | None
    """index of a feature, or of a group; None is the target"""
    by: Literal["attribution", "OV", "K", "Q"]
    value: float
    """in units of the target; of the reader's pre-activation; of the score above its row's mean"""
    source: int | None = None
    """of a K or Q edge: the position that the reader's head looks at"""
    members: list[int] = field(default_factory=list)
    """from or into a group: indices of the edges that it sums"""


@dataclass(frozen=True)
class Circuit:
    """Nodes and edges, and what they are of."""

    model: str
    saes: dict[int, str]
    """names of checkpoints by layer"""
    tokens: list[int]
    target: Target
    value: float
    """of the target on the prompt"""
    nodes: list[Node]
    edges: list[Edge]

    def json(self) -> str:
        """As a file has it."""
        return json.dumps({"schema_version": VERSION, **asdict(self)}, indent=1, allow_nan=False)

    @classmethod
    def load(cls, file: Path) -> "Circuit":
        """What `json` made.

        Raises:
            ValueError: it is no circuit, or an edge leads nowhere.
            OSError: it cannot be read.
        """
        try:
            found: dict[str, Any] = read_json(file, dict[str, Any])
            version = found.pop("schema_version", None)
            require(version == VERSION, f"schema version {version}, this program reads {VERSION}")
            circuit = msgspec.convert(found, cls, strict=False)
        except ValueError as error:
            raise ValueError(flaw(file, error)) from error
        ends = [end for edge in circuit.edges for end in (edge.writer, edge.reader) if end is not None]
        require(all(0 <= end < len(circuit.nodes) for end in ends), f"{file} is damaged (an edge leads nowhere)")
        return circuit


def trace(
    nodes: Nodes,
    target: Target,
    names: dict[int, str],
    features: int = 12,
    depth: int = 2,
    share: float = 0.4,
    here: bool = True,
    steps: int = 0,
) -> Circuit:
    """The circuit of a target.

    Args:
        names: of the SAEs' checkpoints by layer.
        features: how many enter by their attribution to the target, the strongest.
        depth: how many times what a feature reads is followed to the features that wrote it.
        share: of the largest of an edge's kind into the same feature, from which a node has an edge of its own.
        here: whether only those at the target's own position do, from which edges lead to others; or those of all.
        steps: of integrated gradients; 0: the gradient.

    Raises:
        ValueError: the target is not of this prompt.
    """
    number = Number(nodes, target)
    attribution = number.attribution(steps)
    of_features = attribution[attribution["kind"] == "feature"]
    if here:
        of_features = of_features[of_features["position"] == target.position]
    strongest = of_features.loc[of_features["attribution"].abs().nlargest(features).index]
    strongest = number.removed(strongest)
    graph = _Graph(attribution, strongest)
    scores = cache(partial(_scores, nodes))  # features of a head look at a source because of one score
    for row in strongest.itertuples():
        graph.edge(_key_of(row), None, "attribution", float(row.attribution))
    rest = float(attribution["attribution"].sum() - strongest["attribution"].sum())
    graph.rest(None, "attribution", rest)
    level = [_key_of(row) for row in strongest.itertuples()]
    seen: set[tuple] = set()
    for _ in range(depth):
        found: list[tuple] = []
        for reader in level:
            if reader not in seen:
                seen.add(reader)
                found += _take_apart(graph, nodes, reader, share, scores)
        level = found
    return Circuit(
        model=nodes.frozen.lm.name,
        saes=names,
        tokens=nodes.frozen.tokens.tolist(),
        target=target,
        value=number.value(),
        nodes=graph.nodes,
        edges=graph.edges,
    )


class _Graph:
    """Nodes and edges as they come."""

    def __init__(self, attribution: pd.DataFrame, removed: pd.DataFrame) -> None:
        self.nodes: list[Node] = []
        self.edges: list[Edge] = []
        self._index: dict[tuple, int] = {}
        self._known = _by_node(attribution, ["activation", "attribution"])
        self._removed = _by_node(removed, ["effect", "direct"])

    def at(self, key: tuple) -> int:
        """Index of a node, added where it is new."""
        if key not in self._index:
            self._index[key] = len(self.nodes)
            names = ("activation", "attribution", "effect", "direct")
            figures = (*self._known.get(key, (math.nan,) * 2), *self._removed.get(key, (math.nan,) * 2))
            known: dict[str, Any] = {n: value for n, value in zip(names, figures, strict=True) if not math.isnan(value)}
            self.nodes.append(Node(*key, **known))
        return self._index[key]

    def edge(self, writer: tuple, reader: tuple | None, by: Any, value: float, source: int | None = None) -> None:
        """From a node to a feature, or to the target."""
        self.edges.append(Edge(self.at(writer), None if reader is None else self.at(reader), by, value, source))

    def rest(self, reader: tuple | None, by: Any, value: float, source: int | None = None) -> None:
        """From all that has no edge of its own."""
        self.edges.append(Edge(None, None if reader is None else self.at(reader), by, value, source))


def _by_node(table: pd.DataFrame, figures: list[str]) -> dict[tuple, tuple[float, ...]]:
    keys = zip(*(table[name].tolist() for name in _NODE), strict=True)
    return dict(zip(keys, zip(*(table[name].tolist() for name in figures), strict=True), strict=True))


def _scores(nodes: Nodes, layer: int, head: int, query: int, source: int) -> dict[str, Parts]:
    return {"K": at_key(nodes, layer, head, query, source), "Q": at_query(nodes, layer, head, query, source)}


def _take_apart(
    graph: _Graph, nodes: Nodes, reader: tuple, share: float, scores: Callable[..., dict[str, Parts]]
) -> list[tuple]:
    """Edges of a feature; returns the features that it reads."""
    _, layer, head, feature, query = reader
    parts = upstream(nodes, layer, feature, query)
    found = _edges(graph, parts, reader, "OV", share, None)
    if query == 0 or nodes.saes[layer].is_dense:  # many heads look for a dense SAE's feature
        return found
    source = 1 + int(parts.sums(query + 1)[1:].abs().argmax())
    for by, parts in scores(layer, head, query, source).items():
        found += _edges(graph, parts, reader, by, share, source)
    return found


def _edges(graph: _Graph, parts: Parts, reader: tuple, by: str, share: float, source: int | None) -> list[tuple]:
    large, found = parts.above(share), []
    for row in large.table().itertuples():
        writer = _key_of(row)
        graph.edge(writer, reader, by, float(row.value), source)
        if row.kind == "feature" and pd.notna(row.activation):
            found.append(writer)
    graph.rest(reader, by, float(parts.value.sum() - large.value.sum()), source)
    return found


def _key_of(row: Any) -> tuple:
    return (str(row.kind), int(row.layer), int(row.head), int(row.feature), int(row.position))
