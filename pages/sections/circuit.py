"""A target's circuit: its graph, one node of it and all nodes as a table, and how much its features make alone."""

from dataclasses import asdict
from functools import partial
from typing import Any

import pandas as pd
import streamlit as st

from analysis.prompt.circuit import group
from analysis.prompt.circuit.graph import Circuit, Edge, Node
from analysis.prompt.circuit.target import Target
from analysis.runs.sets import LayerSet
from pages.charts import circuit as charts
from pages.components.listing import listing
from pages.sections.circuit_choices import feature_name
from pages.shared import circuits
from pages.shared.columns import draw_table
from pages.shared.page import feature_link
from pages.shared.pick import choose, drop, put, select
from pages.shared.words import in_words

CHOSEN = ("at", "what", "next", "against", "node", "group0", "group1", "group2")  # which mean nothing on another prompt
_GROUPS = 3
_HEADS, _FEATURES = "Heads", "Features"
_WIDEST = 64  # tokens of a graph that can be read side by side
_FIGURES = {
    "attribution": "what it adds to the target at first order, over all paths",
    "effect": "what the target loses in a run without it",
    "direct": "what of that goes straight to the logits",
}
_BY = {
    "attribution": "gives to the target",
    "OV": "is read by",
    "K": "at the source makes it look there:",
    "Q": "makes it look there:",
}


def show(of_set: LayerSet, circuit: Circuit, tokens: list[str]) -> None:
    """The graph, then all nodes as a table beside one of them."""
    if not circuit.nodes:
        st.info(f"The target is {circuit.value:.3f}, but no feature of a layer before it fires there.")
        return
    nodes = node_table(of_set, circuit, tokens)
    st.markdown(f"The target is **{circuit.value:.3f}**. {_whole(circuit)}")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        inside = choose("Nodes are", [_HEADS, _FEATURES], "inside")
        by_hand = _pick_groups(nodes)
    if len(tokens) > _WIDEST:
        st.caption(f"{len(tokens)} tokens do not fit side by side: the table below says the same in words.")
    graph = st.container()  # above the box that says which of its nodes is marked
    left, right = st.columns([3, 2])
    with right:
        chosen = int(nodes.index[nodes["name"] == select(st, "Node", nodes["name"].tolist(), "node")][0])
        _one(of_set, circuit, nodes, chosen)
    with left:
        rows = nodes.reset_index()[["node", "what", "at", "attribution", "effect", "direct", "words"]]
        settings = {name: st.column_config.NumberColumn(format="%.3f", help=text) for name, text in _FIGURES.items()}
        listing(rows, "node", chosen, partial(_pick, nodes), "nodes", height=480, node=None, **settings)
    closed: list[group.Group] = []
    if inside == _HEADS:  # all but the one that is looked into
        closed = [each for each in group.heads(circuit) if chosen not in each.members] + group.mlps(circuit)
    with graph:
        frames = _frames(group.grouped(circuit, by_hand + closed), nodes, tokens, chosen)
        chart = charts.graph(*frames, tokens, _top(circuit))
        st.altair_chart(chart, key="graph", on_select=partial(_clicked, nodes))
        st.caption(
            "Blue is a feature of a head, or a head, larger with its attribution; grey is the rest: what SAEs leave "
            "out (error), biases, MLPs, the embedding. Solid: what a head's value path carries (OV). Dashed: why the "
            "head looks there, by what is at the key (K) and at the query (Q). Broader is more of what it goes into. "
            "A click opens a node."
        )
    whole = group.grouped(circuit, by_hand)
    st.download_button("The circuit as JSON", whole.json, "circuit.json", "application/json", on_click="ignore")


def node_table(of_set: LayerSet, circuit: Circuit, tokens: list[str]) -> pd.DataFrame:
    """A row per node by its index, the strongest features first: what it is, and what it does for the target."""
    table = pd.DataFrame([asdict(node) for node in circuit.nodes])
    table["what"] = [_what(node) for node in circuit.nodes]
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


def _whole(circuit: Circuit) -> str:
    direct = [edge for edge in circuit.edges if edge.reader is None]
    shown = sum(edge.value for edge in direct if edge.writer is not None)
    whole = sum(edge.value for edge in direct)
    return (
        f"At first order all that heads write adds {whole:+.3f} over all layers, of which the features below add "
        f"{shown:+.3f}; layers build on each other, so this is no share of the target."
    )


def _pick_groups(nodes: pd.DataFrame) -> list[group.Group]:
    """Nodes that are drawn as one, by hand."""
    by_name = {name: int(index) for index, name in nodes["name"].items()}
    groups: list[group.Group] = []
    with st.popover("Group nodes", help="draw some as one, under a name"):
        for place in range(_GROUPS):
            key = f"group{place}"
            if any(each not in by_name for each in st.session_state.get(key, [])):
                st.session_state[key] = [each for each in st.session_state[key] if each in by_name]
            members = st.multiselect("Drawn as one", list(by_name), key=key, bind="query-params")
            if not members:
                break
            default = f"group {place + 1}"
            name = st.text_input("called", default, max_chars=40, key=f"called{place}", bind="query-params")
            groups.append(group.Group(name or default, [by_name[each] for each in members]))
    return groups


def _what(node: Node) -> str:
    if node.kind == "feature":
        return feature_name(node.layer, node.head, node.feature)
    return node.name or (node.kind if node.layer < 0 else f"{node.kind} {_head(node)}")


def _head(node: Node) -> str:
    return f"{node.layer}.{node.head}" if node.head >= 0 else str(node.layer)


def _top(circuit: Circuit) -> int:
    if circuit.target.layer is not None:
        return circuit.target.layer
    return max((node.layer for node in circuit.nodes), default=0) + 1


def _frames(circuit: Circuit, nodes: pd.DataFrame, tokens: list[str], chosen: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Nodes and edges as they are drawn: an edge is as strong as its part of all that goes into its reader so.

    Args:
        circuit: with groups as one node each.
        nodes: of the circuit without groups, which say what a group has in it, and what a click on it opens.
    """
    rows: list[dict[str, Any]] = []
    index = iter(sorted(set(nodes.index) - {i for node in circuit.nodes for i in node.members}))  # as they were
    for node in circuit.nodes:
        members = nodes.loc[nodes.index.isin(node.members or [next(index)])]
        rows.append(
            {
                "what": _what(node), "token": tokens[node.position], "kind": node.kind, "layer": node.layer,
                "position": node.position, "attribution": node.attribution, "activation": node.activation,
                "words": "; ".join(members["what"]) if node.members else members["words"].iloc[0],
                "opens": members["name"].iloc[0], "marked": chosen in members.index,
                "label": node.name if node.kind == "group" else _head(node) if node.kind == "feature" else "",
            }
        )  # fmt: skip
    drawn = charts.placed(pd.DataFrame(rows).astype({"attribution": float, "activation": float}))
    drawn.loc[drawn.duplicated(["label", "position"]), "label"] = ""  # features side by side
    size = drawn["attribution"].abs().fillna(0.0)
    drawn["size"] = size / max(size.max(), 1e-12)
    target = {"x": float(circuit.target.position), "y": float(_top(circuit))}
    into: dict[tuple, float] = {}
    for edge in circuit.edges:
        into[edge.reader, edge.by] = into.get((edge.reader, edge.by), 0.0) + abs(edge.value)
    lines: list[dict[str, Any]] = []
    for edge in circuit.edges:
        if edge.writer is None or edge.writer == edge.reader:  # the rest, and what is within a group
            continue
        start, end = drawn.loc[edge.writer], target if edge.reader is None else drawn.loc[edge.reader]
        reader = "the target" if edge.reader is None else drawn.loc[edge.reader, "what"]
        lines.append(
            {
                "x": start["x"], "y": start["y"], "x2": float(end["x"]), "y2": float(end["y"]), "by": edge.by,
                "value": edge.value, "strength": abs(edge.value) / max(into[edge.reader, edge.by], 1e-12),
                "edge": f"{start['what']} {_BY[edge.by]} {reader}",
            }
        )  # fmt: skip
    return drawn, pd.DataFrame(lines, columns=["x", "y", "x2", "y2", "by", "value", "strength", "edge"])


def _one(of_set: LayerSet, circuit: Circuit, nodes: pd.DataFrame, chosen: int) -> None:
    """A node: what it is, and everything that goes into it and out of it."""
    node = circuit.nodes[chosen]
    if node.kind == "feature":
        st.text(nodes.loc[chosen, "words"])
        with st.container(horizontal=True):
            feature_link(of_set.members[node.layer], node.feature, "Its dashboard")
            if node.layer > 0:
                its = nodes.loc[chosen, ["what", "at"]].tolist()
                st.button("Explain it instead", on_click=_explain, args=its, type="tertiary")
    for title, end, edges in (
        ("It reads, and looks there because of", "writer", [e for e in circuit.edges if e.reader == chosen]),
        ("It goes into", "reader", [e for e in circuit.edges if e.writer == chosen]),
    ):
        if edges:
            st.caption(title)
            frame = _ends(edges, nodes, end)
            digits = st.column_config.NumberColumn(format="%.3f")
            draw_table(frame, {"value": digits}, height=min(260, 40 + 35 * len(frame)))


def _ends(edges: list[Edge], nodes: pd.DataFrame, end: str) -> pd.DataFrame:
    other = [getattr(edge, end) for edge in edges]
    missing = "all that is smaller" if end == "writer" else "the target"
    return pd.DataFrame(
        {
            "by": [edge.by for edge in edges],
            "node": [missing if each is None else nodes.loc[each, "what"] for each in other],
            "token": ["" if each is None else nodes.loc[each, "at"] for each in other],
            "value": [edge.value for edge in edges],
        }
    )


def _pick(nodes: pd.DataFrame, node: int) -> None:
    put("node", nodes.loc[node, "name"])


def _explain(feature: str, at: str) -> None:
    """A feature as the target, in place of the prediction; its circuit has other nodes."""
    drop(CHOSEN)
    put("what", feature)
    put("at", at)


def _clicked(nodes: pd.DataFrame) -> None:
    chosen = charts.clicked(st.session_state["graph"]["selection"])
    if chosen in set(nodes["name"]):
        put("node", chosen)


def faithfulness(of_set: LayerSet, prompt: str, target: Target) -> None:
    """The curve, computed where it is asked for."""
    st.subheader("How much its features make alone", anchor=False)
    left, right = st.columns([1, 3], vertical_alignment="center")
    errors = left.toggle("Keep what SAEs leave out", True, key="errors", bind="query-params")
    right.caption(
        "The strongest features of the prompt by attribution are kept, computed anew from what is left; all others of "
        "all layers stand at their mean over the text that was analysed. 1: the target as it is; 0: no feature kept."
    )
    if not st.toggle("Compute it", False, key="curve", bind="query-params", help="a minute for thirty layers"):
        return
    curve = circuits.faithfulness(of_set, prompt, target, errors)
    if curve is None:
        st.info("It needs an analysis of every layer; a summary is enough.")
        return
    st.altair_chart(charts.faithfulness(curve), width="stretch")
