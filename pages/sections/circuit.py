"""A target's circuit: which target, its graph, what a node of it is, and how much its features make alone."""

from dataclasses import asdict
from functools import partial
from typing import Any

import pandas as pd
import streamlit as st

from analysis.prompt.circuit.graph import Circuit, Node
from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.circuit.target import Target
from analysis.runs.sets import LayerSet, layer_sets
from analysis.tokens import in_text, visible
from pages.charts import circuit as charts
from pages.components.listing import listing
from pages.shared import circuits
from pages.shared.columns import draw_table
from pages.shared.page import feature_link
from pages.shared.pick import put, select
from pages.shared.words import in_words
from trainer.checkpoint import Checkpoint

CHOSEN = ("at", "next", "against", "node")  # here, which means nothing on another prompt
_NOTHING = "nothing: the logit itself"
_LOG = "all others: its log probability"
_HERE, _ANYWHERE = "at that token", "at any token"
_WIDEST = 64  # tokens of a graph that can be read side by side
_FIGURES = {
    "attribution": "node times gradient: what it adds to the target at first order, over all paths",
    "effect": "what the target loses in a run without it",
    "direct": "what of that goes straight to the logits",
}
_BY = {
    "attribution": "gives to the target",
    "OV": "is read by",
    "K": "at the source makes it look there:",
    "Q": "makes it look there:",
}


def pick_set(checkpoints: list[Checkpoint]) -> LayerSet | None:
    """SAEs of several layers of one model; None, with a sentence, where there are none."""
    sets = {each.name: each for each in layer_sets(checkpoints) if len(each.members) > 1}
    if not sets:
        st.info("A circuit needs SAEs on several layers of one model. This command trains such a set:")
        st.code("python -m trainer --config=sweeps/layers.yaml", language="bash")
        return None
    words = {f"{name}: {len(each.members)} layers": each for name, each in sets.items()}
    return words[select(st, "SAEs", list(words), "saes")]


def pick_target(nodes: Nodes) -> Target:
    """What is explained: the prediction after a token, against another one."""
    labels = token_labels(nodes)[1:]
    a, b, c = st.columns(3)
    at = 1 + labels.index(select(a, "After", labels, "at", index=len(labels) - 1))
    predicted = circuits.predictions(nodes, at)
    names = {f"{row.token} {row.probability:.0%} ({row.id})": int(row.id) for row in predicted.itertuples()}
    token = names[select(b, "Why", list(names), "next", help="the likeliest next tokens")]
    others = [name for name, each in names.items() if each != token]
    against = select(c, "rather than", [*others, _NOTHING, _LOG], "against")
    if against in names:
        return Target(at, token, names[against])
    return Target(at, token, log_probability=against == _LOG)


def token_labels(nodes: Nodes) -> list[str]:
    """Every token by its position, as select boxes name it."""
    strings = in_text(nodes.frozen.lm.token_strings(nodes.frozen.tokens.tolist()))
    return [f"{position}: {visible(text)}" for position, text in enumerate(strings)]


def pick_size() -> tuple[int, int, float, bool]:
    """How much of it is drawn: features, steps back, the share from which something is an edge, and where it begins."""
    a, b, c, d = st.columns(4)
    features = a.slider("Features", 1, 40, 8, key="features", bind="query-params")
    depth = b.slider("Steps back", 0, 4, 2, key="depth", bind="query-params")
    what = "of the largest that goes into the same node so"
    share = c.slider("Edges from", 5, 100, 40, 5, key="share", bind="query-params", format="%d %%", help=what)
    begins = select(d, "Beginning with features", [_HERE, _ANYWHERE], "begin")
    return features, depth, share / 100, begins == _HERE


def show(of_set: LayerSet, circuit: Circuit, labels: list[str]) -> None:
    """The graph beside one node of it, then all nodes as a table."""
    nodes = node_table(of_set, circuit, labels)
    chosen = st.session_state.get("node")
    if chosen not in nodes.index:
        features = nodes.loc[nodes["kind"] == "feature", "attribution"].abs()
        chosen = int(features.idxmax()) if features.notna().any() else None
    st.markdown(f"The target is **{circuit.value:.3f}**. {_drawn(circuit)}")
    if len(labels) > _WIDEST:
        st.caption("Tokens are many: the table below says what the graph does.")
    chart = charts.graph(*_frames(circuit, nodes, labels), labels, _top(circuit), chosen)
    st.altair_chart(chart, key="graph", on_select=partial(_clicked, len(nodes)))
    st.caption(
        "Blue is a feature of a head, larger with its attribution; grey is the rest: what SAEs leave out (error), "
        "biases, MLPs, the embedding. Solid: what a head's value path carries (OV). Dashed: why the head looks there, "
        "by what is at the key (K) and at the query (Q). Broader is more of what it goes into. A click opens a node."
    )
    left, right = st.columns([3, 2])
    with left:
        rows = nodes.reset_index()[["node", "name", "token", "attribution", "effect", "direct", "words"]]
        rows = rows.sort_values("attribution", key=lambda values: values.abs(), ascending=False, kind="stable")
        settings = {name: st.column_config.NumberColumn(format="%.3f", help=text) for name, text in _FIGURES.items()}
        listing(rows, "node", chosen, partial(put, "node"), "nodes", height=420, node=None, **settings)
    with right:
        if chosen is not None:
            _one(of_set, circuit, nodes, chosen)
    st.download_button("The circuit as JSON", circuit.json, "circuit.json", "application/json", on_click="ignore")


def _drawn(circuit: Circuit) -> str:
    direct = [edge for edge in circuit.edges if edge.reader is None]
    shown = sum(edge.value for edge in direct if edge.writer is not None)
    whole = sum(edge.value for edge in direct)
    return (
        f"At first order all that heads write adds {whole:+.3f} over all layers, of which the features below add "
        f"{shown:+.3f}; layers build on each other, so this is no share of the target."
    )


def node_table(of_set: LayerSet, circuit: Circuit, labels: list[str]) -> pd.DataFrame:
    """A row per node, by its index: what it is, and what it does for the target."""
    table = pd.DataFrame([asdict(node) for node in circuit.nodes])
    table["name"] = [_name(node) for node in circuit.nodes]
    table["token"] = [labels[node.position] for node in circuit.nodes]
    table["words"] = ""
    for layer, checkpoint in of_set.members.items():
        here = table.index[(table["layer"] == layer) & (table["kind"] == "feature")]
        if len(here):
            table.loc[here, "words"] = in_words(checkpoint, table.loc[here, "feature"])
    numbers = ["activation", "attribution", "effect", "direct"]
    table[numbers] = table[numbers].astype(float)
    return table.rename_axis("node")


def _name(node: Node) -> str:
    if node.kind == "feature":
        return f"{node.layer}.{node.head} feature {node.feature}"
    place = "" if node.layer < 0 else f" {node.layer}" if node.head < 0 else f" {node.layer}.{node.head}"
    return f"{node.kind}{place}"


def _top(circuit: Circuit) -> int:
    layers = [node.layer for node in circuit.nodes]
    return max(layers, default=0) + 1


def _frames(circuit: Circuit, nodes: pd.DataFrame, labels: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Nodes and edges as they are drawn: an edge is as strong as its part of all that goes into its reader so."""
    drawn = charts.placed(nodes.reset_index())
    size = drawn["attribution"].abs()
    drawn["size"] = (size / size.max()).fillna(0.0) if size.notna().any() else 0.0
    xy = drawn.set_index("node")[["x", "y"]]
    target = {"x": float(circuit.target.position), "y": float(_top(circuit))}
    into = pd.Series(
        [abs(edge.value) for edge in circuit.edges],
        pd.MultiIndex.from_tuples([(_end(edge.reader), edge.by) for edge in circuit.edges]),
    ).groupby(level=[0, 1]).sum()  # fmt: skip
    rows: list[dict[str, Any]] = []
    for edge in circuit.edges:
        if edge.writer is None:
            continue
        start = xy.loc[edge.writer]
        end = target if edge.reader is None else xy.loc[edge.reader]
        reader = "the target" if edge.reader is None else nodes.loc[edge.reader, "name"]
        rows.append(
            {
                "x": start["x"], "y": start["y"], "x2": float(end["x"]), "y2": float(end["y"]), "by": edge.by,
                "value": edge.value, "strength": abs(edge.value) / max(into[(_end(edge.reader), edge.by)], 1e-12),
                "what": f"{nodes.loc[edge.writer, 'name']} {_BY[edge.by]} {reader}",
            }
        )  # fmt: skip
    columns = ["x", "y", "x2", "y2", "by", "value", "strength", "what"]
    kept = ["node", "name", "token", "kind", "size", "attribution", "activation", "words", "x", "y"]
    return drawn[kept], pd.DataFrame(rows, columns=columns)


def _end(reader: int | None) -> int:
    return -1 if reader is None else reader


def _one(of_set: LayerSet, circuit: Circuit, nodes: pd.DataFrame, chosen: int) -> None:
    """A node: what it is, and everything that goes into it and out of it."""
    node = circuit.nodes[chosen]
    st.markdown(f"**{_name(node)}** at token {nodes.loc[chosen, 'token']}")
    if node.kind == "feature":
        st.text(nodes.loc[chosen, "words"])
        feature_link(of_set.members[node.layer], node.feature, "Its dashboard")
    into = [edge for edge in circuit.edges if edge.reader == chosen]
    out = [edge for edge in circuit.edges if edge.writer == chosen]
    for title, edges, end in (
        ("It reads, and looks there because of", into, "writer"),
        ("It goes into", out, "reader"),
    ):
        if not edges:
            continue
        st.caption(title)
        other = [getattr(edge, end) for edge in edges]
        missing = "all that is smaller" if end == "writer" else "the target"
        frame = pd.DataFrame(
            {
                "by": [edge.by for edge in edges],
                "node": [missing if each is None else nodes.loc[each, "name"] for each in other],
                "token": ["" if each is None else nodes.loc[each, "token"] for each in other],
                "value": [edge.value for edge in edges],
            }
        )
        digits = st.column_config.NumberColumn(format="%.3f")
        draw_table(frame, {"value": digits}, height=min(260, 40 + 35 * len(frame)))


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


def _clicked(n: int) -> None:
    chosen = charts.clicked(st.session_state["graph"]["selection"])
    if chosen is not None and 0 <= chosen < n:
        put("node", chosen)
