"""A target's circuit: its graph, one node and one edge of it, and all nodes as a table."""

from functools import partial

import pandas as pd
import streamlit as st

from analysis.prompt.circuit import group
from analysis.prompt.circuit.graph import Circuit, Edge
from analysis.runs.sets import LayerSet
from pages.charts import circuit as charts
from pages.charts.common import clicked
from pages.components.listing import listing
from pages.sections.circuit_drawn import drawn_edges, drawn_nodes, node_table, strongest, top
from pages.shared.columns import draw_table
from pages.shared.page import feature_link
from pages.shared.pick import choose, drop, put, select

# What means nothing on another prompt.
CHOSEN = ("at", "what", "next", "against", "node", "edge", "group0", "group1", "group2")
_GROUPS = 3
_HEADS, _FEATURES = "Heads", "Features"
_NO_EDGE = "none"
_WIDEST = 64  # tokens of a graph that can be read side by side
_WHOLE = {
    "attribution": "what all that heads write gives to the target, at first order",
    "OV": "all that it reads (a pre-activation, or a group's sum of them)",
    "K": "the score above its row's mean, by what is at the key",
    "Q": "the score above its row's mean, by what is at the query",
}
_LINKS = {
    "reads": "the node of which it reads most, where it has edges",
    "because": "the node that does most for its head to look where it reads most, by key or query",
}
_FIGURES = {
    "attribution": "what it adds to the target at first order, over all paths",
    "effect": "what the target loses in a run without it",
    "direct": "what of that goes straight to the logits",
}


def show(of_set: LayerSet, circuit: Circuit, tokens: list[str]) -> None:
    """The graph, an edge of it, all nodes as a table, and one of them."""
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
    graph, of_edge, table = st.container(), st.container(), st.container()  # above the box that says which is marked
    chosen = int(nodes.index[nodes["name"] == select(st, "Node", nodes["name"].tolist(), "node")][0])
    _one(of_set, circuit, nodes, chosen)
    with table:
        rows = nodes.assign(**strongest(circuit, nodes)).reset_index()
        rows = rows[["node", "what", "at", "attribution", "effect", "direct", *_LINKS, "words"]]
        settings = {name: st.column_config.NumberColumn(format="%.3f", help=text) for name, text in _FIGURES.items()}
        settings |= {name: st.column_config.TextColumn(name, help=text) for name, text in _LINKS.items()}
        listing(rows, "node", chosen, partial(_pick, nodes), "nodes", height=400, node=None, **settings)
    closed: list[group.Group] = []
    if inside == _HEADS:  # all but the one that is looked into
        closed = [each for each in group.heads(circuit) if chosen not in each.members] + group.mlps(circuit)
    shown = group.grouped(circuit, by_hand + closed)
    points, at = drawn_nodes(shown, nodes, tokens, chosen)
    lines = drawn_edges(shown, points, tokens, at)
    with of_edge:
        edge = select(st, "Edge", [_NO_EDGE, *lines["name"]], "edge", help="or click one in the graph")
        for place in lines.index[lines["name"] == edge][:1]:
            _edge(circuit, shown.edges[place], lines.loc[place, "whole"], nodes)
    with graph:
        chart = charts.graph(
            points, lines.assign(marked=lines["name"] == edge), dict(zip(at, tokens, strict=True)), top(circuit)
        )
        st.altair_chart(chart, key="graph", on_select=partial(_clicked, nodes))
        st.caption(
            "Blue is a feature of a head, or a head, larger with its attribution; grey is the rest: what SAEs leave "
            "out (error), biases, MLPs, the embedding. Solid: what a head's value path carries (OV). Dashed: why the "
            "head looks there, by what is at the key (K) and at the query (Q). Broader is more of what it goes into. "
            "A click opens a node, or what an edge sums."
        )
    whole = group.grouped(circuit, by_hand)
    st.download_button("The circuit as JSON", whole.json, "circuit.json", "application/json", on_click="ignore")


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
    into, out = st.columns(2)
    for column, title, end, edges in (
        (into, "It reads, and looks there because of", "writer", [e for e in circuit.edges if e.reader == chosen]),
        (out, "It goes into", "reader", [e for e in circuit.edges if e.writer == chosen]),
    ):
        if edges:
            with column:
                st.caption(title)
                _draw_edges(_ends(edges, nodes, end))


def _edge(circuit: Circuit, edge: Edge, whole: float, nodes: pd.DataFrame) -> None:
    """An edge: its sum, of what it is a part, and between groups the edges that it sums."""
    st.text(f"{edge.value:+.3f} of {whole:+.3f}: {_WHOLE[edge.by]}.")
    members = [circuit.edges[place] for place in edge.members]
    if len(members) < 2:
        return
    ends = [[_name(getattr(each, end), nodes) for each in members] for end in ("writer", "reader")]
    frame = pd.DataFrame({"written by": ends[0], "read by": ends[1], "value": [each.value for each in members]})
    frame = frame.sort_values("value", key=abs, ascending=False)
    if edge.by in ("K", "Q"):
        st.caption("Features of a head look there because of one score: it stands once, with the first of them.")
    _draw_edges(frame)


def _draw_edges(frame: pd.DataFrame) -> None:
    draw_table(frame, {"value": st.column_config.NumberColumn(format="%.3f")}, height=min(260, 40 + 35 * len(frame)))


def _name(node: int | None, nodes: pd.DataFrame) -> str:
    return "the target" if node is None else str(nodes.loc[node, "name"])


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
    selection = st.session_state["graph"]["selection"]
    if (node := clicked(selection, "node", "opens")) in set(nodes["name"]):
        put("node", node)
    if edge := clicked(selection, "edge", "name"):
        put("edge", edge)
