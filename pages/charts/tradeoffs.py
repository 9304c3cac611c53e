"""Altair charts of many checkpoints at once: their frontier and their training curves."""

from functools import partial
from typing import Any

import altair as alt
import pandas as pd

from analysis.runs.tables import METRICS, SCORES
from pages.charts.common import GREY, PALETTE, tips

# What Kissane et al. (arXiv:2406.17759) ask of an SAE on the outputs of a whole attention layer.
TARGETS = {"L0": 20, "CE_score": 0.8}
DENSE = "(dense)"  # how the recipe of a dense baseline ends
_FORMATS = {"L0": ",.1f", "MSE": ",.4g", "FVU": ".3f", "CE_score": ".3f", "KL_score": ".3f", "parameters": ",d",
            "training_tokens": ",d", "training_minutes": ",.1f"}  # fmt: skip
_TIPS = [*tips("name:N", "recipe:N", "sparsity:Q", "status:N"), alt.Tooltip("figures:N", title="figures from")]
_TIPS += [alt.Tooltip(f"{field}:Q", title=field.replace("_", " "), format=form) for field, form in _FORMATS.items()]


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
    drawn = frame.assign(training_minutes=frame["training_seconds"] / 60, training_tokens=frame["tokens_seen"])
    if f"{metric}_se" in frame:
        drawn["low"], drawn["high"] = (drawn[metric] + sign * drawn[f"{metric}_se"] for sign in (-1, 1))
    base = alt.Chart()
    faded = alt.condition("datum.chosen", alt.value(1.0), alt.value(0.2))

    layers = _targets(metric, head)
    layers.append(
        base.transform_filter("datum.front")
        .mark_line(strokeWidth=1.5, opacity=0.5)
        .encode(x=x, y=y, color=colour, order=alt.Order("L0:Q"))
    )
    if "low" in drawn:
        low = alt.Y("low:Q", title=y_title, scale=y_scale)
        layers.append(
            base.transform_filter("isValid(datum.low)")
            .mark_rule(strokeWidth=2)
            .encode(x=x, y=low, y2=alt.Y2("high:Q"), color=colour, opacity=faded)
        )
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
    layers.append(  # of the others the tooltip tells it
        base.transform_filter("datum.front")
        .mark_text(fontSize=11, align="left", baseline="middle", dx=10)
        .encode(x=x, y=y, text=alt.Text("sparsity:N"), color=colour, opacity=faded)
    )
    return alt.layer(*layers, data=drawn).properties(height=520)


def picked(frame: pd.DataFrame, selection: dict[str, Any]) -> list[str]:
    """Names of the checkpoints that a selection on `tradeoff` means: those in the rectangle, else those clicked."""
    ranges = selection.get("several") or {}
    if ranges:
        inside = pd.Series(True, index=frame.index)
        for column, (low, high) in ranges.items():
            inside &= frame[column].between(min(low, high), max(low, high))
        return list(frame.loc[inside, "name"])
    clicked = {point["name"] for point in selection.get("one") or []}
    return [name for name in frame["name"] if name in clicked]


def training_curves(frame: pd.DataFrame, figure: str, recipes: list[str]) -> alt.Chart:
    """One logged figure over training tokens, a line per checkpoint.

    Its name comes from a file, and as that of a field Altair and Vega would read signs of their own in it. Lines have
    a colour each while there are enough colours, else that of their recipe in `tradeoff`.

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
    drawn = frame[["name", "recipe", "step", "tokens"]].assign(value=frame[figure])
    return (
        alt.Chart(drawn)
        .mark_line(interpolate="monotone")
        .encode(
            x=alt.X("tokens:Q", title="Training tokens", axis=alt.Axis(format="~s")),
            y=alt.Y("value:Q", title=f"{figure.replace('_', ' ')}{on}", scale=alt.Scale(zero=False)),
            color=alt.Color(
                field,
                scale=alt.Scale(domain=domain, range=_colours(len(domain))),
                legend=alt.Legend(title=None, orient="top", columns=columns, symbolOpacity=1, labelLimit=400),
            ),
            detail=alt.Detail("name:N"),
            tooltip=[*tips("name", "recipe", "step"), alt.Tooltip("value:Q", title=figure, format=".4g")],
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
    at = alt.Chart(alt.Data(values=[{"x": TARGETS["L0"], "y": TARGETS["CE_score"]}]))
    rule = at.mark_rule(strokeDash=[5, 4], color=GREY)
    text = partial(at.mark_text, align="left", dx=4, fontSize=11, color=GREY)
    l0, score = (alt.value(f"{key.replace('_', ' ')} {value} (Kissane et al.)") for key, value in TARGETS.items())
    drawn = [rule.encode(x=alt.X("x:Q")), text(dy=8).encode(x=alt.X("x:Q"), y=alt.value(0), text=l0)]
    if metric == "CE_score":
        drawn += [rule.encode(y=alt.Y("y:Q")), text(dy=-8).encode(x=alt.value(0), y=alt.Y("y:Q"), text=score)]
    return drawn
