"""Altair charts of heads: their figures, what they read and redundancy."""

import altair as alt
import numpy as np
import pandas as pd

from analysis.attribution import SLOTS
from pages.charts.common import CRITERIA, GREY, HEADS, PALETTE, tips

_FAINT = 2  # % below which a number is drawn faintly


def per_head_bars(frame: pd.DataFrame, metric: str, title: str) -> alt.LayerChart:
    """One figure per head, with its standard error where there is one."""
    heads = alt.Scale(domain=sorted(frame["head"]))  # also those without a measurable figure
    base = alt.Chart().encode(x=HEADS.scale(heads))
    shown = tips("head:O", f"{metric}:Q")
    bars = base.mark_bar(color=PALETTE[0]).encode(y=alt.Y(f"{metric}:Q", title=title), tooltip=shown)
    layers = [bars]
    if f"{metric}_se" in frame:
        frame = frame.assign(low=frame[metric] - frame[f"{metric}_se"], high=frame[metric] + frame[f"{metric}_se"])
        whiskers = base.transform_filter("isValid(datum.low)").mark_rule(color=PALETTE[4], strokeWidth=2)
        layers.append(whiskers.encode(y=alt.Y("low:Q", title=title), y2=alt.Y2("high:Q")))
    return alt.layer(*layers, data=frame).properties(height=220)


def slot_map(heads: pd.DataFrame, measure: str, title: str) -> alt.LayerChart:
    """Shares by source slot, one row per head.

    Args:
        measure: of the columns `<measure>_<slot>`.
    """
    rows = [
        (h["head"], slot.replace("_", " "), 100 * h[f"{measure}_{slot}"]) for _, h in heads.iterrows() for slot in SLOTS
    ]
    frame = pd.DataFrame(rows, columns=["head", "slot", "share"])
    slots = [slot.replace("_", " ") for slot in SLOTS]
    base = alt.Chart().encode(
        x=alt.X(
            "slot:N",
            title=None,
            sort=slots,
            axis=alt.Axis(labelAngle=-45, labelOverlap=False, ticks=False, domain=False),
        ),
        y=alt.Y("head:O", title="Head", axis=alt.Axis(labelFlush=False, ticks=False, domain=False)),
        tooltip=[*tips("head:O", "slot:N"), alt.Tooltip("share:Q", format=".1f", title="%")],
    )
    shade = alt.Opacity("share:Q", scale=alt.Scale(domain=[0, 100], range=[0, 0.7]), legend=None)
    cells = base.mark_rect(color=PALETTE[0]).encode(opacity=shade)
    # The colour of the page's text, which is readable on every shade, on light and on dark.
    numbers = base.mark_text(color="currentColor", fontSize=11).encode(
        text=alt.Text("share:Q", format=".0f"),
        opacity=alt.condition(alt.datum.share < _FAINT, alt.value(0.35), alt.value(1)),
    )
    return alt.layer(cells, numbers, data=frame).properties(title=title, height=alt.Step(20))


def monosemanticity(heads: pd.DataFrame) -> alt.LayerChart:
    """Share of each head's features that have its role, with Wilson intervals: unweighted, and weighted by firing."""
    rows = []
    for head in heads.itertuples():
        rows.append((head.head, "each feature once", head.mono_share, head.mono_low, head.mono_high))
        rows.append((head.head, "by firing", head.mono_weighted, head.mono_weighted_low, head.mono_weighted_high))
    frame = pd.DataFrame(rows, columns=["head", "counted", "share", "low", "high"])
    base = alt.Chart().encode(
        x=HEADS,
        xOffset=alt.XOffset("counted:N", sort=None),
        color=alt.Color(
            "counted:N",
            title="Features with the head's role",
            scale=alt.Scale(range=PALETTE[:2]),
            legend=alt.Legend(orient="top", labelLimit=200, titleLimit=250),
        ),
    )
    y = alt.Y("share:Q", title="Share (95 % interval)", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))
    points = base.mark_point(filled=True, size=60).encode(
        y=y, tooltip=tips("head:O", "counted:N", share=".1%", low=".1%", high=".1%")
    )
    bars = base.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", title="Share (95 % interval)"), y2=alt.Y2("high:Q"))
    return alt.layer(bars, points, data=frame).properties(height=300)


def redundancy(counts: list[list[int]]) -> alt.LayerChart:
    """How many features of a head (row) have a redundant partner in another head (column)."""
    frame = pd.DataFrame(
        [(a, b, n) for a, row in enumerate(counts) for b, n in enumerate(row) if a != b],
        columns=["head", "other", "features"],
    )
    base = alt.Chart().encode(
        x=alt.X("other:O", title="has a partner in head", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("head:O", title="Features of head"),
        tooltip=tips("head:O", "other:O", "features:Q"),
    )
    largest = max(1, int(np.max(counts)))
    cells = base.mark_rect().encode(
        color=alt.Color("features:Q", title="Features", scale=alt.Scale(scheme="viridis", domain=[0, largest]))
    )
    light = alt.datum.features > 0.6 * largest
    texts = base.mark_text(fontSize=11).encode(
        text=alt.Text("features:Q"), color=alt.condition(light, alt.value("black"), alt.value("white"))
    )
    return alt.layer(cells, texts, data=frame).properties(height=300)


def merging(curve: pd.DataFrame, l0: float) -> alt.LayerChart:
    """L0 where linked features of different heads count once, over the threshold from which they are linked."""
    frame = curve.assign(linked=curve["criterion"].map(CRITERIA))
    lines = (
        alt.Chart(frame)
        .mark_line(point=True)
        .encode(
            x=alt.X("threshold:Q", title="Linked from this Jaccard index and cosine on", scale=alt.Scale(reverse=True)),
            y=alt.Y("L0:Q", title="L0, a cluster counts once", scale=alt.Scale(domainMin=0)),
            color=alt.Color(
                "linked:N", title="Linked by", sort=None, scale=alt.Scale(range=PALETTE[:3]),
                legend=alt.Legend(orient="top", labelLimit=250, columns=1),
            ),
            tooltip=tips("linked", "threshold", "clusters", "largest", L0=".2f"),
        )
    )  # fmt: skip
    plain = alt.Chart(pd.DataFrame({"L0": [l0], "name": [f"L0 {l0:.1f} without merging"]}))
    rule = plain.mark_rule(strokeDash=[4, 4], color=GREY).encode(y=alt.Y("L0:Q"))
    text = plain.mark_text(align="left", dx=4, dy=12, color=GREY).encode(
        y=alt.Y("L0:Q"), x=alt.value(0), text=alt.Text("name:N")
    )
    return (lines + rule + text).properties(height=340)
