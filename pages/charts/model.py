"""Altair charts of all heads of a model: a map of layers and heads, and two figures against each other."""

import altair as alt
import pandas as pd

from analysis.attribution import SLOTS
from pages.charts.common import GREY, PALETTE, SLOT_SCALE, tips

_WIDEST = 30  # pixels of a cell
_FORMAT = ".3g"
_SHADES = ["rgba(213,94,0,1)", "rgba(0,114,178,0)", "rgba(0,114,178,1)"]  # readable on light and dark
_LAYERS = [PALETTE[5], PALETTE[1], PALETTE[4]]  # from the first to the last


def head_map(frame: pd.DataFrame, column: str, chosen: str | None) -> alt.LayerChart:
    """A cell per head, coloured by a figure or a role; a click selects `head` by name.

    Args:
        frame: `model.head_table`: layer, head, name and the column.
        chosen: name of the head that is marked.
    """
    n_layers, n_heads = frame["layer"].nunique(), frame["head"].nunique()
    step = max(8, min(_WIDEST, 660 // n_heads))
    height = max(9, min(22, 540 // n_layers))
    axis = {"ticks": False, "domain": False, "labelOverlap": True}
    base = alt.Chart().encode(
        x=alt.X("head:O", title="Head", axis=alt.Axis(labelAngle=0, **axis)),
        y=alt.Y("layer:O", title="Layer", sort="descending", axis=alt.Axis(**axis)),
    )
    is_role = not pd.api.types.is_numeric_dtype(frame[column])
    shown = tips("name:N", f"{column}:N") if is_role else tips("name:N", **_with_error(frame, column))
    cells = base.mark_rect(stroke=GREY, strokeWidth=0.3, cursor="pointer").encode(
        color=_slots(frame, column) if is_role else _shades(frame, column), tooltip=shown
    )
    ground = base.mark_rect(fill="transparent", stroke=GREY, strokeWidth=0.3)  # of what has no value
    mark = base.transform_filter(alt.FieldEqualPredicate(chosen or "", "name")).mark_rect(
        fill="transparent", stroke=PALETTE[4], strokeWidth=2.5
    )
    cells = cells.transform_filter(f"isValid(datum['{column}'])").add_params(_click())
    kept = ["name", "layer", "head", column, *([f"{column}_se"] if f"{column}_se" in frame else [])]
    return alt.layer(ground, cells, mark, data=frame[kept]).properties(width=alt.Step(step), height=alt.Step(height))


def scatter(frame: pd.DataFrame, x: str, y: str, chosen: str | None) -> alt.LayerChart:
    """A point per head, by two of its figures; a click selects `head` by name.

    Args:
        frame: `model.head_table` without the heads that lack one of them.
        chosen: name of the head that is marked.
    """
    base = alt.Chart().encode(
        x=alt.X(f"{x}:Q", title=x.replace("_", " "), scale=alt.Scale(zero=False, nice=True)),
        y=alt.Y(f"{y}:Q", title=y.replace("_", " "), scale=alt.Scale(zero=False, nice=True)),
    )
    colour = alt.Color("layer:Q", title="layer", scale=alt.Scale(range=_LAYERS))
    points = base.mark_circle(size=45, opacity=0.8, cursor="pointer").encode(
        color=colour, tooltip=tips("name:N", **(_with_error(frame, x) | _with_error(frame, y)))
    )
    mark = base.transform_filter(alt.FieldEqualPredicate(chosen or "", "name"))
    ring = mark.mark_point(size=160, color=PALETTE[4], strokeWidth=2.5)
    name = mark.mark_text(dx=10, align="left", fontSize=12, color="currentColor").encode(text=alt.Text("name:N"))
    kept = [each for name in (x, y) for each in (name, f"{name}_se") if each in frame]
    data = frame[list(dict.fromkeys(["name", "layer", *kept]))]
    return alt.layer(points.add_params(_click()), ring, name, data=data).properties(height=420)


def _click() -> alt.Parameter:
    return alt.selection_point(name="head", fields=["name"])


def _slots(frame: pd.DataFrame, column: str) -> alt.Color:
    present = set(frame[column].dropna())
    legend = alt.Legend(orient="right", symbolLimit=20, values=[slot for slot in SLOTS if slot in present])
    return alt.Color(f"{column}:N", title=None, scale=SLOT_SCALE, legend=legend)


def _shades(frame: pd.DataFrame, column: str) -> alt.Color:
    """From the page's ground to blue; where there are values below 0, from orange over the ground to blue."""
    legend = alt.Legend(title=None, format=_FORMAT, gradientLength=160)
    least, most = float(frame[column].min()), float(frame[column].abs().max())
    signed = least < 0
    domain = [-most, 0, most] if signed else [0, most]
    return alt.Color(
        f"{column}:Q", scale=alt.Scale(domain=domain, range=_SHADES if signed else _SHADES[1:]), legend=legend
    )


def _with_error(frame: pd.DataFrame, column: str) -> dict[str, str]:
    return {name: _FORMAT for name in (column, f"{column}_se") if name in frame}
