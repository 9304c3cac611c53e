"""Nodes and edges of a circuit as tables: what they are called, and what of them is drawn."""

from dataclasses import asdict
from typing import Any

import pandas as pd

from analysis.prompt.circuit.graph import Circuit, Edge, Node
from analysis.runs.sets import LayerSet
from pages.charts import circuit as charts
from pages.sections.circuit_choices import feature_name
from pages.shared.words import in_words

_BY = {
    "attribution": "gives to the target",
    "OV": "is read by",
    "K": "at the source makes it look there:",
    "Q": "makes it look there:",
}


def node_table(of_set: LayerSet, circuit: Circuit, tokens: list[str]) -> pd.DataFrame:
    """A row per node by its index, the strongest features first: what it is, and what it does for the target."""
    table = pd.DataFrame([asdict(node) for node in circuit.nodes])
    table["what"] = [what(node) for node in circuit.nodes]
    table["at"] = [tokens[node.position] for node in circuit.nodes]
    table["name"] = table["what"] + " at " + table["at"]
    table["words"] = ""
    for layer, checkpoint in of_set.members.items():
        here = table.index[(table["layer"] == layer) & (table["kind"] == "feature")]
        if len(here):
            table.loc[here, "words"] = in_words(checkpoint, table.loc[here, "feature"])
    numbers = ["activation", "attribution", "effect", "direct"]
    table[numbers] = table[numbers].astype(float)
    is_rest, strength = table["kind"] != "feature", -table["attribution"].abs().fillna(-1.0)
    order = pd.DataFrame({"rest": is_rest, "strength": strength}).sort_values(["rest", "strength"], kind="stable").index
    return table.loc[order].rename_axis("node")


def strongest(circuit: Circuit, nodes: pd.DataFrame) -> dict[str, list[str]]:
    """Of every node what it `reads` most, and what does most for that (`because`); "" where it has no such edges."""
    best: dict[tuple, Edge] = {}
    for edge in circuit.edges:
        if edge.writer is not None and edge.by != "attribution":
            key = edge.reader, "reads" if edge.by == "OV" else "because"
            best[key] = max(best.get(key, edge), edge, key=lambda each: abs(each.value))
    names = {key: nodes.loc[edge.writer, "name"] for key, edge in best.items()}
    return {name: [names.get((node, name), "") for node in nodes.index] for name in ("reads", "because")}


def what(node: Node) -> str:
    """As a node is called, without its token."""
    if node.kind == "feature":
        return feature_name(node.layer, node.head, node.feature)
    return node.name or (node.kind if node.layer < 0 else f"{node.kind} {_head(node)}")


def _head(node: Node) -> str:
    return f"{node.layer}.{node.head}" if node.head >= 0 else str(node.layer)


def top(circuit: Circuit) -> int:
    """The layer at which the target stands."""
    if circuit.target.layer is not None:
        return circuit.target.layer
    return max((node.layer for node in circuit.nodes), default=0) + 1


def drawn_nodes(
    circuit: Circuit, nodes: pd.DataFrame, tokens: list[str], chosen: int
) -> tuple[pd.DataFrame, list[float]]:
    """A row for every node as it is drawn, and where every token is.

    Args:
        circuit: with groups as one node each.
        nodes: of the circuit without groups, which say what a group has in it, and what a click on it opens.
        chosen: the node that is marked.
    """
    rows: list[dict[str, Any]] = []
    index = iter(sorted(set(nodes.index) - {i for node in circuit.nodes for i in node.members}))  # as they were
    for node in circuit.nodes:
        members = nodes.loc[nodes.index.isin(node.members or [next(index)])]
        rows.append(
            {
                "what": what(node), "token": tokens[node.position], "kind": node.kind, "layer": node.layer,
                "position": node.position, "attribution": node.attribution, "activation": node.activation,
                "words": "; ".join(members["what"]) if node.members else members["words"].iloc[0],
                "opens": members["name"].iloc[0], "marked": chosen in members.index,
                "label": node.name if node.kind == "group" else _head(node) if node.kind == "feature" else "",
            }
        )  # fmt: skip
    drawn, at = charts.placed(pd.DataFrame(rows).astype({"attribution": float, "activation": float}), len(tokens))
    drawn.loc[drawn.duplicated(["label", "position"]), "label"] = ""  # features side by side
    size = drawn["attribution"].abs().fillna(0.0)
    return drawn.assign(size=size / max(size.max(), 1e-12)), at


def drawn_edges(circuit: Circuit, drawn: pd.DataFrame, tokens: list[str], at: list[float]) -> pd.DataFrame:
    """A row for every edge as it is drawn, by its index: as strong as its part of all that goes into its reader so.

    Args:
        drawn, at: the nodes and tokens.
    """
    target = {"x": at[circuit.target.position], "y": float(top(circuit))}
    into: dict[tuple, tuple[float, float]] = {}
    for edge in circuit.edges:
        size, whole = into.get(way(edge), (0.0, 0.0))
        into[way(edge)] = size + abs(edge.value), whole + edge.value
    rows: dict[int, dict[str, Any]] = {}
    for place, edge in enumerate(circuit.edges):
        if edge.writer is None or edge.writer == edge.reader:  # the rest, and what is within a group
            continue
        start, end, reader, by = drawn.loc[edge.writer], target, "the target", ""
        if edge.reader is not None:
            end = drawn.loc[edge.reader]
            reader, by = f"{end['what']} at {end['token']}", f" ({edge.by})"
        if edge.source is not None and edge.by == "Q":
            by = f" (Q, to {tokens[edge.source]})"
        size, whole = into[way(edge)]
        rows[place] = {
            "x": start["x"], "y": start["y"], "x2": float(end["x"]), "y2": float(end["y"]), "by": edge.by,
            "value": edge.value, "strength": abs(edge.value) / max(size, 1e-12), "whole": whole,
            "edge": f"{start['what']} {_BY[edge.by]} {'' if edge.reader is None else end['what']}".rstrip(),
            "name": f"{start['what']} at {start['token']} \u2192 {reader}{by}",
        }  # fmt: skip
    columns = ["x", "y", "x2", "y2", "by", "value", "strength", "whole", "edge", "name"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def way(edge: Edge) -> tuple:
    """What edges have in common that sum to what they take apart: the reader, and how it reads."""
    return edge.reader, edge.by, edge.source
