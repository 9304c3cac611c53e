"""Altair charts of several checkpoints, each in its colour on the whole page."""

import altair as alt
import pandas as pd

from pages.charts.common import HEADS, PALETTE, tips, tokens


def _colour(
    colours: dict[str, str],
    frame: pd.DataFrame,
    field: str = "name",
    title: str | None = "Checkpoint",
    columns: int = 2,
) -> alt.Color:
    """The given colours; the legend names what the frame has of them."""
    present = [name for name in colours if name in set(frame[field])]
    return alt.Color(
        f"{field}:N",
        title=title,
        sort=list(colours),
        scale=alt.Scale(domain=list(colours), range=list(colours.values())),
        legend=alt.Legend(
            orient="top", columns=columns, labelLimit=500, symbolLimit=len(present), symbolOpacity=1, values=present
        ),
    )


def l0_histograms(frame: pd.DataFrame, colours: dict[str, str]) -> alt.FacetChart:
    """Per-token L0 distributions, one panel a head, an outline per checkpoint: filled bars would hide each other.

    Args:
        frame: name, head, start, end, share: bins as `tables.binned` makes them.
    """
    base = alt.Chart(frame).encode(
        x=alt.X("start:Q", title="Active features of a token", scale=alt.Scale(nice=False, zero=True)),
        y=alt.Y("share:Q", title="Share of tokens", axis=alt.Axis(format="%", tickCount=4), stack=None),
        color=_colour(colours, frame),
        tooltip=[
            *tips("name", "head"),
            alt.Tooltip("start:Q", title="L0 from"),
            alt.Tooltip("end:Q", title="below"),
            *tips(share=".1%"),
        ],
    )
    drawn = base.mark_area(interpolate="step-after", opacity=0.18, line={"strokeWidth": 1.8, "opacity": 1})
    # Each head on its own scales: a head that is silent on most tokens would flatten all the others.
    return (
        drawn.properties(width=178, height=110)
        .facet(facet=alt.Facet("head:N", title="Head", sort="ascending"), columns=3)
        .resolve_scale(x="independent", y="independent")
    )


def merging(frame: pd.DataFrame, colours: dict[str, str], share: bool) -> alt.Chart:
    """L0, or what is left of it, where linked features of different heads count once.

    Args:
        frame: name, threshold, L0, share, clusters, largest, of one criterion.
    """
    y = (
        alt.Y("share:Q", title="Share of L0 that is left", axis=alt.Axis(format="%"), scale=alt.Scale(zero=False))
        if share
        else alt.Y("L0:Q", title="L0 (log scale)", scale=alt.Scale(type="log", nice=False, padding=12))
    )
    return (
        alt.Chart(frame)
        .mark_line(point=True)
        .encode(
            x=alt.X("threshold:Q", title="Linked from this similarity on", scale=alt.Scale(reverse=True, zero=False)),
            y=y,
            color=_colour(colours, frame, columns=1),
            tooltip=tips("name", "threshold", "clusters", "largest", L0=".2f", share=".1%"),
        )
        .properties(height=230 + 24 * frame["name"].nunique())  # the legend takes its lines from it
    )


def found_per_head(frame: pd.DataFrame, colours: dict[str, str], both: str, one: str) -> alt.Chart:
    """Features of each head of either checkpoint: those that the other has too, and those that it has not.

    Args:
        frame: head, name, found (`both` or `one`), features.
    """
    return (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            x=HEADS,
            xOffset=alt.XOffset("name:N", sort=list(colours)),
            y=alt.Y("features:Q", title="Features"),
            color=_colour(colours, frame, columns=1),
            opacity=alt.Opacity(
                "found:N",
                title=None,
                scale=alt.Scale(domain=[both, one], range=[1.0, 0.35]),
                legend=alt.Legend(orient="top", columns=2, labelLimit=400, symbolFillColor=PALETTE[-1]),
            ),
            order=alt.Order("found:N"),
            tooltip=tips("name", "head", "found", "features"),
        )
        .properties(height=300)
    )


def over_tokens(frame: pd.DataFrame, colours: dict[str, str]) -> alt.Chart:
    """Activations of a few features along a prompt, bars side by side at each token."""
    return (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            x=tokens("position"),
            xOffset=alt.XOffset("feature:N", sort=list(colours)),
            y=alt.Y("activation:Q", title="Activation"),
            color=_colour(colours, frame, "feature", None, columns=4),
            tooltip=tips("feature", "token", activation=".3f"),
        )
        .properties(height=250 + 24 * (len(colours) // 4))
    )


def norm_shares(shares: list[float], colour: str) -> alt.Chart:
    """How much of a dense feature's squared decoder norm lies in each head."""
    frame = pd.DataFrame({"head": range(len(shares)), "share": shares})
    return (
        alt.Chart(frame)
        .mark_bar(color=colour)
        .encode(
            x=HEADS,
            y=alt.Y("share:Q", title="Squared decoder norm", axis=alt.Axis(format="%", tickCount=4)),
            tooltip=tips("head", share=".1%"),
        )
        .properties(height=260)
    )
