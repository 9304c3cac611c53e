"""Altair charts of one feature."""

import altair as alt
import numpy as np
import pandas as pd

from analysis.attribution import SLOTS
from pages.charts.common import PALETTE, slot_bars, slot_colour, tips

_NAMED = 0.01  # of a feature's DFA: the legend names slots from here on


def histogram(counts: np.ndarray, low: float, high: float, title: str, of: str) -> alt.Chart:
    """Counts in equal bins from `low` to `high`, on a root scale: rare large values are what one looks for."""
    edges = np.linspace(low, high, len(counts) + 1)
    frame = pd.DataFrame({"from": edges[:-1], "to": edges[1:], "count": counts})
    last = int(np.flatnonzero(counts)[-1]) if counts.any() else 0
    return (
        alt.Chart(frame.iloc[: last + 1])
        .mark_bar(color=PALETTE[0], binSpacing=0)
        .encode(
            x=alt.X("from:Q", title=title, bin="binned"),
            x2=alt.X2("to:Q"),
            y=alt.Y("count:Q", title=f"{of} (√)", scale=alt.Scale(type="sqrt"), axis=alt.Axis(tickCount=4)),
            tooltip=tips("count", **{"from": ".3g", "to": ".3g"}),
        )
        .properties(height=180)
    )


def slots(row: pd.Series) -> alt.Chart:
    """Shares of a feature's positive DFA by source slot, on text and on repeated random tokens."""
    rows = [
        (text, slot, row[f"{prefix}dfa_{slot}"])
        for prefix, text in (("", "text"), ("repeated_", "repeated tokens"))
        for slot in SLOTS
        if row[f"{prefix}dfa_firings"]
    ]
    frame = pd.DataFrame(rows, columns=["on", "slot", "share"])
    drawn = slot_bars(
        frame, alt.Y("on:N", title=None, sort=["text", "repeated tokens"]), "Share of positive DFA", ["on"]
    )
    colour = slot_colour(frame.loc[frame["share"] >= _NAMED, "slot"], 2)
    return drawn.encode(color=colour).properties(height=alt.Step(28))  # a fixed height would go to the legend
