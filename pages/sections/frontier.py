"""The checkpoints of a site as points: their frontier, their table, and the training curves of those selected."""

from collections import Counter
from typing import NamedTuple

import pandas as pd
import streamlit as st

from analysis.runs import tables
from pages.charts import tradeoffs as charts
from pages.shared.columns import draw_table
from pages.shared.page import refuse
from pages.shared.pick import choose, pick_head, pick_text, put
from trainer.checkpoint import Checkpoint, CheckpointError


class Figures(NamedTuple):
    """What is drawn of which checkpoints."""

    frame: pd.DataFrame
    """`tables.summary` of all of the site"""
    metric: str
    """L0 against this, a key of `tables.METRICS`"""
    log: bool
    head: int | None

    @property
    def recipes(self) -> list[str]:
        """All of the site, so that each keeps its colour."""
        return sorted(self.frame["recipe"].unique())


def pick(checkpoints: list[Checkpoint]) -> tuple[list[Checkpoint], Figures]:
    """The checkpoints of a site, and their figures on a text, of one head or all."""
    left, middle, right = st.columns([3, 4, 2], vertical_alignment="bottom")
    n = Counter(each.site for each in checkpoints)  # where most points are, a frontier is
    by_site = sorted(checkpoints, key=lambda each: (-n[each.site], each.config.model.name, each.layer, each.site))
    sites = list(dict.fromkeys(each.site for each in by_site))
    site = left.selectbox("Model and layer", sites, key="site", bind="query-params")
    checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.site == site]
    repeated = pick_text(column=middle)
    head = pick_head(checkpoints[0].n_heads, column=right)
    left, right = st.columns([7, 2], vertical_alignment="bottom")
    frame = tables.summary(checkpoints, repeated, head)
    unknown = {score for score in tables.SCORES if frame[score].isna().all()}
    spoken = {metric: metric.replace("_", " ") for metric in tables.METRICS if metric not in unknown}
    metric = choose("L0 against", spoken, "y", "FVU", left, format_func=spoken.get)
    for score in sorted(unknown):
        st.caption(
            f"No checkpoint has a {score.replace('_', ' ')} here: zero ablation costs less than 3 standard errors of "
            "this text, or nothing is evaluated yet."
        )
    log = right.toggle("Log axes", value=True, key="log", bind="query-params", help="scores stay linear")
    return checkpoints, Figures(frame, metric, log, head)


def show(figures: Figures) -> pd.DataFrame:
    """The frontier, and on it a selection of checkpoints; returns their rows, all where none is selected."""
    frame = figures.frame
    above = st.container()  # the chart stands above what is selected on it
    names = st.multiselect(
        "Selected checkpoints",
        list(frame["name"]),
        key="runs",
        bind="query-params",
        placeholder="All: click a point (shift for several) or drag over some to select them",
    )
    with above:
        _draw(figures, names)
    return frame[frame["name"].isin(names)] if names else frame


def _draw(figures: Figures, selected: list[str]) -> None:
    """The chart, and which checkpoints are not on it for what reason."""
    frame, metric, log, head = figures
    measured = frame.dropna(subset=["L0", metric])
    positive = measured["L0"] > 0
    if metric not in tables.SCORES:
        positive &= measured[metric] > 0
    shown = measured[positive] if log else measured

    def marked() -> None:  # a click or a rectangle
        put("runs", charts.picked(shown[["name", "L0", metric]], st.session_state["frontier"]["selection"]))

    if len(shown):
        chosen = shown["name"].isin(selected) | (not selected)
        drawn = shown.assign(front=tables.pareto(shown, metric), chosen=chosen)
        chart = charts.tradeoff(drawn, metric, log, figures.recipes, head)
        st.altair_chart(chart, width="stretch", key="frontier", on_select=marked)
    else:
        st.info("No checkpoint has this figure: choose another one, another text or another head.")
    if (shown["figures"] == "training batch").any():
        st.caption("Hollow: still training, figures of its last training batch.")
    missing = frame[~frame["name"].isin(measured["name"])]
    dense = missing["block"].eq("dense") & (head is not None)
    waiting = ~dense & missing[["L0", "FVU"]].isna().all(axis=1)
    score = " (zero ablation costs less than 3 standard errors)" if metric == "CE_score" else ""
    for rows, why in (
        (missing[dense], "A dense SAE has no L0 of one head"),
        (missing[waiting], "Not evaluated yet"),
        (missing[~dense & ~waiting], f"Not measurable here{score}, or not yet"),
        (measured[~measured["name"].isin(shown["name"])], "Not on log axes, because a value is 0"),
    ):
        if len(rows):
            st.text(f"{why}: {', '.join(sorted(rows['name']))}")


def table(selected: pd.DataFrame) -> None:
    """Figures and costs."""
    first = [
        "name", "recipe", "sparsity", "L0", "FVU", "CE_score", "KL_score", "parameters", "tokens_seen",
        "training_minutes", "status", "figures", "MSE", "MSE_per_dim", "silent_fraction", "n_tokens", "dead_fraction",
    ]  # fmt: skip
    unknown = {name for name in selected if name in tables.MEASURED and selected[name].isna().all()}
    hidden = {"training_seconds", "block", "model", "hook_layer", *unknown}
    order = [column for column in dict.fromkeys([*first, *selected]) if column not in hidden]
    draw_table(selected.assign(training_minutes=selected["training_seconds"] / 60), column_order=order)
    st.caption(
        "Training minutes are the sum over the log of tokens by tokens per second: SAEs of one command train together, "
        "and each has the time of all of them; harvesting and evaluating are not in it. Silent: on the tokens of "
        "the evaluation. Dead: in training, for as many tokens as `dead_after_tokens` says. Empty: not known."
    )
    for score in tables.SCORES:
        words = selected[score].map(tables.outside)
        for word, names in selected["name"].groupby(words[words != ""]):
            st.text(f"{score.replace('_', ' ')} {word}: {', '.join(sorted(names))}")


def training_curves(checkpoints: list[Checkpoint], selected: pd.DataFrame, recipes: list[str]) -> None:
    """One logged figure of the selected checkpoints over training."""
    left, right = st.columns([5, 2], vertical_alignment="bottom")
    left.subheader("Training curves")
    names = set(selected["name"])
    try:
        curves = tables.curves([checkpoint for checkpoint in checkpoints if checkpoint.name in names])
    except CheckpointError as error:  # metrics.jsonl is damaged
        refuse(error)
        return
    logged = [name for name in curves.columns if name not in ("name", "step", "tokens")]
    if not logged:
        st.caption("Nothing was logged for the selected checkpoints: select others on the chart above.")
        return
    comparable = logged.index("FVU") if "FVU" in logged else 0  # recipes have different losses
    figure = right.selectbox("Figure", logged, index=comparable, key="curve", bind="query-params")
    curves = (
        tables.thinned(curves, figure)
        .drop(columns="recipe", errors="ignore")
        .merge(selected[["name", "recipe"]], on="name")
    )
    st.altair_chart(charts.training_curves(curves, figure, recipes), width="stretch")
