"""Charts of many checkpoints at once: their frontier and their training curves; no Streamlit."""

import math
from itertools import pairwise
from typing import Any

import altair as alt
import pandas as pd

from analysis.runs.tables import METRICS, SCORES
from pages.charts.common import GREY, PALETTE

# What Kissane et al. (arXiv:2406.17759) ask of an SAE on the outputs of a whole attention layer.
TARGETS = {"L0": 20, "CE_score": 0.8}
DENSE = "(dense)"  # how the recipe of a dense baseline ends
_TIPS = [
    alt.Tooltip("name:N"),
    alt.Tooltip("recipe:N"),
    alt.Tooltip("sparsity:N"),
    alt.Tooltip("status:N"),
    alt.Tooltip("figures:N", title="figures from"),
    alt.Tooltip("L0:Q", format=",.1f"),
    alt.Tooltip("MSE:Q", format=",.4g"),
    alt.Tooltip("FVU:Q", format=".3f"),
    alt.Tooltip("CE_score:Q", title="CE score", format=".3f"),
    alt.Tooltip("KL_score:Q", title="KL score", format=".3f"),
    alt.Tooltip("parameters:Q", format=",d"),
    alt.Tooltip("tokens_seen:Q", title="training tokens", format=",d"),
    alt.Tooltip("training_minutes:Q", title="training minutes", format=",.1f"),
]


def tradeoff(frame: pd.DataFrame, metric: str, log: bool, recipes: list[str], head: int | None) -> alt.LayerChart:
    """L0 against one metric: a point per checkpoint, a line per recipe through those that none of it beats.

    Args:
        frame: `tables.summary` with the columns `front` (`tables.pareto`) and `chosen`.
        metric: key of METRICS.
        log: log axes; scores, which can be negative, stay linear.
        recipes: all that the site has, so that a recipe keeps its colour.
        head: whose figures these are; None for all heads, to which the targets apply.
    """
    x_log, y_log = log, log and metric not in SCORES
    single = len(frame) == 1  # one point has no range of its own
    y_title, y_scale = _title(METRICS[metric], head, metric), _scale(y_log, single)
    x = alt.X("L0:Q", title=_title("L0 (mean active features per token)", head), scale=_scale(x_log, single))
    y = alt.Y(f"{metric}:Q", title=y_title, scale=y_scale)
    legend = alt.Legend(title=None, orient="top", columns=5, symbolOpacity=1, labelLimit=400)
    colour = alt.Color("recipe:N", scale=alt.Scale(domain=recipes, range=_colours(len(recipes))), legend=legend)
    shapes = ["square" if recipe.endswith(DENSE) else "circle" for recipe in recipes]
    shape = alt.Shape("recipe:N", scale=alt.Scale(domain=recipes, range=shapes), legend=legend)
    drawn = frame.assign(
        training_minutes=frame["training_seconds"] / 60,
        **_places(frame, metric, x_log, y_log),
    )
    if f"{metric}_se" in frame:
        drawn["low"], drawn["high"] = (drawn[metric] + sign * drawn[f"{metric}_se"] for sign in (-1, 1))
    base = alt.Chart(drawn)
    faded = alt.condition("datum.chosen", alt.value(1.0), alt.value(0.2))

    layers = _targets(metric, head)
    layers.append(
        base.transform_filter("datum.front")
        .mark_line(strokeWidth=1.5, opacity=0.5)
        .encode(x=x, y=y, color=colour, order="L0:Q")
    )
    if "low" in drawn:
        low = alt.Y("low:Q", title=y_title, scale=y_scale)
        layers.append(base.mark_rule(strokeWidth=2).encode(x=x, y=low, y2="high:Q", color=colour, opacity=faded))
    points = base.mark_point(size=130, strokeWidth=2).encode(
        x=x,
        y=y,
        color=colour,
        # Hollow: figures of a training batch.
        fill=alt.condition("datum.figures != 'training batch'", colour, alt.value("transparent")),
        shape=shape,
        opacity=faded,
        tooltip=_TIPS,
    )
    one = alt.selection_point(name="one", fields=["name"])
    several = alt.selection_interval(name="several", mark=alt.BrushConfig(fill=GREY, fillOpacity=0.15))
    layers.append(points.add_params(one, several))
    layers.append(
        base.transform_filter("datum.label != ''")
        .mark_text(
            fontSize=11,
            baseline="middle",
            align=alt.ExprRef("datum.align"),
            dx=alt.ExprRef("datum.dx"),
            dy=alt.ExprRef("datum.dy"),
        )
        .encode(x=x, y=y, text="label:N", color=colour, opacity=faded)
    )
    return alt.layer(*layers).properties(height=520)


def picked(frame: pd.DataFrame, selection: dict[str, Any]) -> list[str]:
    """Names of the checkpoints that a selection on `tradeoff` means: those in the rectangle, else those clicked."""
    ranges = selection.get("several") or {}
    if ranges:
        inside = pd.Series(True, index=frame.index)
        for column, (low, high) in ranges.items():
            inside &= frame[column].between(min(low, high), max(low, high))
        return list(frame.loc[inside, "name"])
    clicked = {each["name"] for each in selection.get("one") or []}
    return [name for name in frame["name"] if name in clicked]


def training_curves(frame: pd.DataFrame, figure: str, recipes: list[str]) -> alt.Chart:
    """One logged figure over training tokens, a line per checkpoint.

    Lines have a colour each while there are enough colours, else that of their recipe in `tradeoff`.

    Args:
        frame: `tables.curves` with a column `recipe`.
        recipes: all that the site has.
    """
    on = "" if figure.startswith("held_out") else " (training batch)"
    names = sorted(frame["name"].unique())
    if len(names) <= len(PALETTE):
        field, domain, columns = "name:N", names, 2
    else:
        field, domain, columns = "recipe:N", recipes, 5
    return (
        alt.Chart(frame)
        .mark_line(interpolate="monotone")
        .encode(
            x=alt.X("tokens:Q", title="Training tokens", axis=alt.Axis(format="~s")),
            y=alt.Y(f"{figure}:Q", title=f"{figure.replace('_', ' ')}{on}", scale=alt.Scale(zero=False)),
            color=alt.Color(
                field,
                scale=alt.Scale(domain=domain, range=_colours(len(domain))),
                legend=alt.Legend(title=None, orient="top", columns=columns, symbolOpacity=1, labelLimit=400),
            ),
            detail="name:N",
            tooltip=["name:N", "recipe:N", "step:Q", alt.Tooltip(f"{figure}:Q", format=".4g")],
        )
        .properties(height=300)
    )


def _scale(log: bool, single: bool) -> alt.Scale:
    if log:
        return alt.Scale(type="log", padding=30, nice=False)
    return alt.Scale(zero=single, padding=30, nice=False)


def _title(title: str, head: int | None, metric: str = "L0") -> str:
    if head is None:
        return title
    if metric in SCORES:
        return f"{title.split(' (')[0]}, only head {head} replaced"
    return f"{title}, head {head}".replace("d_in", "d_head")


def _colours(n: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(n)]


def _targets(metric: str, head: int | None) -> list[alt.LayerChart]:
    """Dashed lines at the targets that the axes show."""
    if head is not None:
        return []
    dashed = {"strokeDash": [5, 4], "color": GREY}
    at = alt.Chart(alt.Data(values=[{"x": TARGETS["L0"], "y": TARGETS["CE_score"]}]))
    rules = [
        at.mark_rule(**dashed).encode(x="x:Q"),
        at.mark_text(align="left", dx=4, dy=8, fontSize=11, color=GREY).encode(
            x="x:Q", y=alt.value(0), text=alt.value(f"L0 {TARGETS['L0']} (Kissane et al.)")
        ),
    ]
    if metric == "CE_score":
        rules.append(at.mark_rule(**dashed).encode(y="y:Q"))
        rules.append(
            at.mark_text(align="left", dx=4, dy=-8, fontSize=11, color=GREY).encode(
                x=alt.value(0), y="y:Q", text=alt.value(f"CE score {TARGETS['CE_score']} (Kissane et al.)")
            )
        )
    return rules


def _places(
    frame: pd.DataFrame, metric: str, x_log: bool, y_log: bool, width: float = 640, height: float = 280
) -> dict[str, list[Any]]:
    """Where each point's label goes: beside it, where no other label or point is; nowhere if there is no room.

    Computed for a chart about as wide as in a window of 1,280 pixels; a wider one has more room.
    """
    xs, ys = _pixels(frame["L0"], x_log, width), _pixels(-frame[metric], False, height)
    if y_log:
        ys = _pixels(1 / frame[metric], True, height)
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in zip(xs, ys, strict=True)]
    lines = _along_lines(frame, xs, ys)
    labels, dxs, dys, aligns = [], [], [], []
    for x, y, text in zip(xs, ys, frame["sparsity"], strict=True):
        boxes = [(_box(x, y, 6.5 * len(text), place), place) for place in _BESIDE]
        free = [each for each in boxes if not any(_overlap(each[0], other) for other in taken)]
        clear = [each for each in free if not any(_overlap(each[0], other) for other in lines)]
        box, place = (clear or free or [(None, (0, 0, "left"))])[0]  # across a line rather than not at all
        if box is not None:
            taken.append(box)
        labels.append(text if box is not None else "")
        for column, value in zip((dxs, dys, aligns), place, strict=True):
            column.append(value)
    return {"label": labels, "dx": dxs, "dy": dys, "align": aligns}


# Where a label may stand: right, left, below and above a point, and between these.
_BESIDE = [(10, 0, "left"), (-10, 0, "right"), (0, 14, "center"), (0, -14, "center"),
           (8, -11, "left"), (8, 11, "left"), (-8, -11, "right"), (-8, 11, "right")]  # fmt: skip


def _box(x: float, y: float, width: float, place: tuple[float, float, str]) -> tuple[float, ...]:
    dx, dy, align = place
    left = x + dx - {"left": 0, "center": width / 2, "right": width}[align]
    return left, y + dy - 6, left + width, y + dy + 6


def _along_lines(frame: pd.DataFrame, xs: list[float], ys: list[float]) -> list[tuple[float, ...]]:
    """Small squares along the lines of the fronts."""
    points = frame.assign(x=xs, y=ys)[frame["front"]].sort_values("L0")
    squares = []
    for _, family in points.groupby("recipe"):
        ends = list(zip(family["x"], family["y"], strict=True))
        for (x0, y0), (x1, y1) in pairwise(ends):
            steps = 1 + int(math.hypot(x1 - x0, y1 - y0) / 4)
            along = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
            squares += [(x - 1, y - 1, x + 1, y + 1) for x, y in along]
    return squares


def _pixels(values: pd.Series, log: bool, length: float) -> list[float]:
    values = [math.log(value) for value in values] if log else list(values)
    low, span = min(values), max(values) - min(values)
    return [(value - low) / (span or 1) * length for value in values]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
