"""Altair charts of a circuit: its graph, and how much of the target its features make."""

import json

import altair as alt
import pandas as pd

from pages.charts.common import GREY, PALETTE, tips

_STROKES = {"OV": [1, 0], "K": [6, 3], "Q": [2, 3], "attribution": [1, 0]}
_COLOURS = {"OV": PALETTE[2], "K": PALETTE[4], "Q": PALETTE[3], "attribution": PALETTE[0]}
_SHAPES = {
    "feature": "circle", "group": "M-1,-0.7H1V0.7H-1Z",
    "error": "cross", "bias": "diamond", "output bias": "triangle-down", "mlp": "square",
    "embedding": "triangle-up", "key bias": "triangle-left", "query bias": "triangle-right",
}  # fmt: skip
_EMPTY = 0.6  # width of a token without nodes, of a node's


def placed(nodes: pd.DataFrame, n_tokens: int) -> tuple[pd.DataFrame, list[float]]:
    """x and y of every node, and x of every token, as wide as the most nodes that stand side by side there.

    y is the layer; the embedding is below, an MLP above its layer.

    Args:
        nodes: kind, layer, position.
    """
    y = nodes["layer"] + nodes["kind"].map({"mlp": 0.5}).fillna(0.0)
    place = pd.DataFrame({"position": nodes["position"], "y": y})
    rank, size = place.groupby(["position", "y"]).cumcount(), place.groupby(["position", "y"])["y"].transform("size")
    width = size.groupby(nodes["position"]).max().reindex(range(n_tokens), fill_value=_EMPTY)
    middle = width.cumsum() - width / 2
    x = nodes["position"].map(middle) + rank + 0.5 - size / 2
    return nodes.assign(x=x, y=y), middle.tolist()


def graph(nodes: pd.DataFrame, edges: pd.DataFrame, tokens: dict[float, str], top: int) -> alt.LayerChart:
    """Tokens across, layers up; a click selects a node by what it `opens`, an edge by its `name`.

    Args:
        tokens: by their x.
        nodes: `placed`, with what, token, kind, size, attribution, activation, words, opens, marked, label.
        edges: x, y, x2, y2, by, value, strength in 0..1, edge, name, marked.
        top: the layer above all, where the target stands.
    """
    labels = json.dumps({f"{x:.2f}": token for x, token in tokens.items()})
    axis = alt.Axis(
        values=list(tokens), labelExpr=f"{labels}[format(datum.value, '.2f')]", labelAngle=-60, labelLimit=90,
        grid=False, ticks=False, labelOverlap=False, domain=False,
    )  # fmt: skip
    x = alt.X("x:Q", title=None, axis=axis, scale=alt.Scale(domain=[0, max(*tokens, *nodes["x"]) + 0.5], nice=False))
    y = alt.Y(
        "y:Q", title="Layer", scale=alt.Scale(domain=[-1.6, top + 0.4], nice=False),
        axis=alt.Axis(tickMinStep=1, format="d", grid=True, gridOpacity=0.15),
    )  # fmt: skip
    kinds = list(_STROKES)
    of_edges = alt.Chart(edges).encode(x=x, y=y, x2=alt.X2("x2:Q"), y2=alt.Y2("y2:Q"))
    lines = of_edges.mark_rule().encode(
        color=alt.Color("by:N", title="Edges", scale=alt.Scale(domain=kinds, range=[_COLOURS[by] for by in kinds])),
        strokeDash=alt.StrokeDash(
            "by:N", title="Edges", scale=alt.Scale(domain=kinds, range=[_STROKES[by] for by in kinds])
        ),
        strokeWidth=alt.StrokeWidth("strength:Q", scale=alt.Scale(domain=[0, 1], range=[0.6, 4]), legend=None),
        opacity=alt.Opacity("strength:Q", scale=alt.Scale(domain=[0, 1], range=[0.35, 0.95]), legend=None),
    )  # fmt: skip
    marked = of_edges.transform_filter(alt.FieldEqualPredicate(True, "marked")).mark_rule(color=PALETTE[4], size=5)
    on_edge = alt.selection_point(name="edge", fields=["name"])
    broad = of_edges.mark_rule(size=9, opacity=0.001, cursor="pointer").encode(tooltip=tips("edge", "by", value=".3g"))
    base = alt.Chart(nodes).encode(x=x, y=y)
    of_head = alt.FieldOneOfPredicate("kind", ["feature", "group"])
    points = base.mark_point(filled=True, opacity=1, cursor="pointer").encode(
        shape=alt.Shape("kind:N", title="Nodes", scale=alt.Scale(domain=list(_SHAPES), range=list(_SHAPES.values()))),
        size=alt.Size("size:Q", scale=alt.Scale(domain=[0, 1], range=[45, 320]), legend=None),
        color=alt.when(of_head).then(alt.value(PALETTE[0])).otherwise(alt.value(GREY)),
        tooltip=tips("what", "token", "words", attribution=".3g", activation=".3g"),
    )
    names = base.transform_filter(alt.datum.label != "").mark_text(align="right", dx=-10, fontSize=10, color=GREY)
    click = alt.selection_point(name="node", fields=["opens"])
    ring = base.transform_filter(alt.FieldEqualPredicate(True, "marked")).mark_point(
        size=420, color=PALETTE[4], strokeWidth=2.5
    )
    layers = (
        marked,
        lines,
        broad.add_params(on_edge),
        points.add_params(click),
        ring,
        names.encode(text=alt.Text("label:N")),
    )
    return alt.layer(*layers).properties(height=max(320, 22 * (top + 2)))


def faithfulness(curve: pd.DataFrame) -> alt.LayerChart:
    """Share of the target against the number of features kept, beside random features with its error."""
    strongest, random = which = ["the strongest", "random ones as frequent"]
    frame = pd.concat(
        [
            curve[["kept"]].assign(which=strongest, share=curve["faithfulness"], se=0.0),
            curve[["kept"]].assign(which=random, share=curve["random"], se=curve["random_se"]),
        ]
    )
    frame["low"], frame["high"] = frame["share"] - frame["se"], frame["share"] + frame["se"]
    axis = alt.Axis(values=curve["kept"].tolist(), format=",d", grid=False)
    base = alt.Chart(frame).encode(
        x=alt.X("kept:Q", title="Features kept", scale=alt.Scale(type="symlog", constant=1), axis=axis),
        color=alt.Color("which:N", title=None, scale=alt.Scale(domain=which, range=[PALETTE[0], GREY])),
    )
    line = base.mark_line(point=True).encode(
        y=alt.Y("share:Q", title="Share of the target"), tooltip=tips("which", kept=",", share=".3f", se=".3f")
    )
    return alt.layer(
        base.mark_errorbar().encode(y=alt.Y("low:Q", title="Share of the target"), y2=alt.Y2("high:Q")), line
    )
