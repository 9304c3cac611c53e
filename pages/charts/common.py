"""Altair charts of frames from `analysis`; no Streamlit, no figures computed here."""

import altair as alt
import pandas as pd

from analysis.attribution import SLOTS

# Okabe and Ito's palette, distinguishable with every common colour vision.
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B8A800", "#7F7F7F"]
GREY = PALETTE[-1]  # of marks that are no data: readable on light and dark
# By what features of different heads are linked before they are counted once.
CRITERIA = {"both": "co-firing and direction", "jaccard": "co-firing alone", "cosine": "direction alone"}
SLOT_COLOURS = dict(
    zip(SLOTS, ["#9AA0A6", "#CC79A7", "#D55E00", "#E69F00", "#0072B2", "#56B4E9", "#009E73"], strict=True)
)
SLOT = alt.Color(
    "slot:N",
    title="Source slot",
    scale=alt.Scale(domain=list(SLOT_COLOURS), range=list(SLOT_COLOURS.values())),
    legend=alt.Legend(orient="top", columns=4, symbolLimit=7),  # two lines: one is cut in half a page
)


def l0_histograms(frame: pd.DataFrame) -> alt.FacetChart:
    """Per-token L0 distribution of one checkpoint, one panel a head."""
    bars = alt.Chart(frame).mark_bar(color=PALETTE[0], opacity=0.9, binSpacing=0)
    encoded = bars.encode(
        x=alt.X("L0:Q", bin=alt.Bin(maxbins=40), title="Active features of a token"),
        y=alt.Y("sum(share):Q", title="Share of tokens", stack=None, axis=alt.Axis(format="%", tickCount=4)),
        tooltip=["head", alt.Tooltip("L0:Q", bin=alt.Bin(maxbins=40)), alt.Tooltip("sum(share):Q", format=".1%")],
    )
    # Each head on its own scale: a head that is silent on most tokens would flatten all the others.
    return (
        encoded.properties(width=185, height=110)
        .facet(facet=alt.Facet("head:N", title="Head", sort="ascending"), columns=3)
        .resolve_scale(y="independent")
    )


def per_head_bars(frame: pd.DataFrame, metric: str, title: str) -> alt.LayerChart:
    """One figure per head, with its standard error where there is one."""
    heads = alt.Scale(domain=sorted(frame["head"]))  # also those without a measurable figure
    base = alt.Chart(frame).encode(x=alt.X("head:O", title="Head", scale=heads, axis=alt.Axis(labelAngle=0)))
    bars = base.mark_bar(color=PALETTE[0]).encode(y=alt.Y(f"{metric}:Q", title=title), tooltip=["head", metric])
    layers = [bars]
    if f"{metric}_se" in frame:
        bounds = frame.assign(low=frame[metric] - frame[f"{metric}_se"], high=frame[metric] + frame[f"{metric}_se"])
        whiskers = alt.Chart(bounds).mark_rule(color=PALETTE[4], strokeWidth=2)
        layers.append(whiskers.encode(x=alt.X("head:O", scale=heads), y=alt.Y("low:Q", title=title), y2="high:Q"))
    return alt.layer(*layers).properties(height=220)


def firing_map(frame: pd.DataFrame, largest: int) -> alt.Chart:
    """Heads by tokens, coloured by how many features fire, up to `largest`; a click selects a cell."""
    scale = alt.Scale(scheme="viridis", domain=[0, max(1, largest)])
    pick = alt.selection_point(name="cell", fields=["head", "position"], toggle=False)
    return (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=alt.X(
                "token:N", title=None, sort=alt.SortField("position"), axis=alt.Axis(labelAngle=-60, labelLimit=90)
            ),
            y=alt.Y("head:O", title="Head"),
            color=alt.Color("active:Q", title="Active features", scale=scale),
            opacity=alt.condition(pick, alt.value(1.0), alt.value(0.45)),
            tooltip=["head", "token", "active", alt.Tooltip("activation:Q", format=".2f")],
        )
        .add_params(pick)
        .properties(height=alt.Step(24))
    )


def roles(frame: pd.DataFrame) -> alt.Chart:
    """Shares by source slot, two bars a head: above where it looks, below what its features read."""
    long = frame.melt(["head", "slot"], ["attention", "dfa"], var_name="measure", value_name="share")
    long["measure"] = long["measure"].map({"attention": "attention", "dfa": "DFA"})
    long["order"] = long["slot"].map({slot: index for index, slot in enumerate(SLOTS)})
    return (
        alt.Chart(long)
        .mark_bar()
        .encode(
            x=alt.X("share:Q", title="Share", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
            y=alt.Y("head:O", title="Head"),
            yOffset=alt.YOffset("measure:N", sort=["attention", "DFA"]),
            color=SLOT,
            order="order:Q",
            tooltip=["head", "measure", "slot", alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(height=alt.Step(19))
    )


def source_strips(frame: pd.DataFrame) -> alt.VConcatChart:
    """Three strips over the sources of one feature: where it looks, what it reads there, and their product."""
    strips = []
    for column, title in (
        ("attention", "Where it looks: A"),
        ("read", "What it reads: (v - b_V)·w"),
        ("dfa", "DFA: their product"),
    ):
        last = column == "dfa"
        strips.append(
            alt.Chart(frame)
            .mark_bar()
            .encode(
                x=alt.X(
                    "token:N",
                    title=None,
                    sort=alt.SortField("source"),
                    axis=alt.Axis(labels=last, ticks=last, labelAngle=-60, labelLimit=90),
                ),
                y=alt.Y(f"sum({column}):Q", title=title.split(":")[0]),
                color=SLOT,
                tooltip=["token", "slot", alt.Tooltip(f"{column}:Q", format=".4f")],
            )
            .properties(height=90, width=780, title=alt.Title(title, anchor="start", fontSize=12))
        )
    return alt.vconcat(*strips, spacing=4)
