"""Colours that all charts share. Charts are altair only: no Streamlit, and no figures computed in them."""

from collections.abc import Iterable

import altair as alt
import pandas as pd

from analysis.attribution import SLOTS

# Okabe and Ito's palette, distinguishable with every common colour vision.
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B8A800", "#7F7F7F"]
GREY = PALETTE[-1]  # of marks that are no data: readable on light and dark
# By what features of different heads are linked before they are counted once.
CRITERIA = {"both": "co-firing and direction", "jaccard": "co-firing alone", "cosine": "direction alone"}
_SLOT_COLOURS = {
    "bos": "#9AA0A6", "self": "#CC79A7", "induction": "#D55E00", "duplicate": "#E69F00", "previous": "#0072B2",
    "fuzzy_induction": "#F0966B", "fuzzy_duplicate": "#F5CF7A", "sentence_start": "#5D3A9B", "punctuation": "#A88BCB",
    "newline": "#8C564B", "digit": "#B8A800", "capitalised": "#00695C", "function": "#8FD3C1", "content": "#009E73",
    "local": "#56B4E9", "other": "#6E7781",
}  # fmt: skip
SLOT_SCALE = alt.Scale(domain=list(SLOTS), range=[_SLOT_COLOURS[slot] for slot in SLOTS])
SLOT = alt.Color(
    "slot:N",
    title="Source slot",
    scale=SLOT_SCALE,
    legend=alt.Legend(orient="top", columns=4, symbolLimit=len(SLOTS)),  # one line is cut in half a page
)
HEADS = alt.X("head:O", title="Head", axis=alt.Axis(labelAngle=0))


def slot_colour(present: Iterable[str], columns: int) -> alt.Color:
    """Colours of source slots below a chart that shows only some of them."""
    present = set(present)
    values = [slot for slot in SLOTS if slot in present]
    return SLOT.title(None).legend(orient="bottom", columns=columns, symbolLimit=len(SLOTS), values=values)


def tokens(order: str, **axis: bool) -> alt.X:
    """Tokens from left to right, in the order of a field."""
    return alt.X("token:N", title=None, sort=alt.SortField(order), axis=alt.Axis(labelAngle=-60, labelLimit=90, **axis))


def tips(*fields: str, **numbers: str) -> list[alt.Tooltip]:
    """What a mark says where it is hovered: fields as they are, then numbers in their formats.

    Objects, here and in every encoding: Altair takes 15 ms to make one of a string. For the same reason the data of
    layers belong to all of them together: else each layer's are printed and compared.
    """
    return [*map(alt.Tooltip, fields), *(alt.Tooltip(f"{name}:Q", format=form) for name, form in numbers.items())]


def clicked(selection: dict, what: str, field: str) -> str | None:
    """A field of the mark that was clicked; None where the click was beside all of them, or on one of another kind.

    Args:
        selection: of a chart's state; every selection in it hears of each click.
        what: the name of a selection of points.
    """
    points = selection.get(what) or [{}]
    return points[0].get(field)


def slot_bars(frame: pd.DataFrame, bar: alt.Y, title: str, named: list[str]) -> alt.Chart:
    """Bars of shares by source slot, stacked in the order of the slots.

    Args:
        frame: slot, share, and what `bar` and `named` name.
    """
    drawn = alt.Chart(frame.assign(order=frame["slot"].map(SLOTS.index))).mark_bar()
    return drawn.encode(
        y=bar,
        x=alt.X("share:Q", title=title, axis=alt.Axis(format="%", tickCount=5)),
        color=SLOT,
        order=alt.Order("order:Q"),
        tooltip=tips(*named, "slot", share=".1%"),
    )
