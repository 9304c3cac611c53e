"""Altair charts of one prompt: what fires where, where a feature reads from, what each head does."""

import altair as alt
import pandas as pd

from pages.charts.common import HEADS, PALETTE, slot_bars, slot_colour, tips, tokens


def firing_map(frame: pd.DataFrame, largest: int) -> alt.Chart:
    """Heads by tokens, coloured by how many features fire, up to `largest`; a click selects a cell."""
    scale = alt.Scale(scheme="viridis", domain=[0, max(1, largest)])
    pick = alt.selection_point(name="cell", fields=["head", "position"], toggle=False)
    return (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=tokens("position"),
            y=alt.Y("head:O", title="Head"),
            color=alt.Color("active:Q", title="Active features", scale=scale),
            opacity=alt.condition(pick, alt.value(1.0), alt.value(0.45)),
            tooltip=tips("head", "token", "active", activation=".2f"),
        )
        .add_params(pick)
        .properties(height=alt.Step(24))
    )


def role_bars(frame: pd.DataFrame) -> alt.Chart:
    """Shares by source slot, two bars a head: above where it looks, below what its features read."""
    long = frame.rename(columns={"dfa": "DFA"}).melt(["head", "slot"], ["attention", "DFA"], "measure", "share")
    drawn = slot_bars(long, alt.Y("head:O", title="Head"), "Share", ["head", "measure"])
    return drawn.encode(yOffset=alt.YOffset("measure:N", sort=["attention", "DFA"])).properties(height=alt.Step(19))


def source_strips(frame: pd.DataFrame) -> alt.VConcatChart:
    """Three strips over the sources of one feature: where it looks, what it reads there, and their product."""
    colour = slot_colour(frame["slot"], 4)
    strips = []
    for column, title in (
        ("attention", "Where it looks: attention A"),
        ("read", "What it reads: (v - b_V)·w"),
        ("dfa", "DFA: their product"),
    ):
        last = column == "dfa"
        strips.append(
            alt.Chart()
            .mark_bar()
            .encode(
                x=tokens("source", labels=last, ticks=last),
                y=alt.Y(f"sum({column}):Q", title=None, axis=alt.Axis(tickCount=3)),
                color=colour,
                tooltip=tips("token:N", "slot:N", **{column: ".4f"}),
            )
            .properties(height=44, width="container", title=alt.Title(title, anchor="start", fontSize=12))
        )
    return alt.vconcat(*strips, spacing=4, data=frame)


def recovered(frame: pd.DataFrame) -> alt.Chart:
    """How much of a logit difference the patch of each head alone recovers."""
    bars = alt.Chart(frame).mark_bar(color=PALETTE[0])
    return bars.encode(
        x=HEADS,
        y=alt.Y("recovered:Q", title="Recovered", axis=alt.Axis(format="%")),
        tooltip=tips("head", patched=".3f", direct=".3f", recovered=".3f"),
    ).properties(height=120)
