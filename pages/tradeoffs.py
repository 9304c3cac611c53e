"""Every checkpoint as a point: how sparse it is against how faithful."""

from functools import partial

import pandas as pd
import streamlit as st

from analysis.runs import tables
from pages.charts import tradeoffs as tradeoff_charts
from pages.shared import common
from trainer.checkpoint import Checkpoint, CheckpointError

ALL, TEXT, REPEATED = "all", "Held-out text", "Repeated random tokens"

common.begin(
    "Tradeoffs",
    "Each point is a checkpoint: fewer active features against a better reconstruction. CE and KL scores splice the "
    "reconstruction into the model; bars are one standard error, and a line joins the points of a recipe that no other "
    "point of it beats.",
)


def select(shown: pd.DataFrame) -> None:
    """A click or a rectangle on the frontier chooses its checkpoints; they are in the URL as `runs`."""
    st.session_state["runs"] = tradeoff_charts.picked(shown, st.session_state["frontier"]["selection"])


@st.fragment(run_every="5s")  # a run that is still training moves, and a new one appears
def page() -> None:
    listed = common.readable()
    left, middle, right = st.columns([3, 4, 2], vertical_alignment="bottom")
    sites = sorted({each.site for each in listed})
    site = left.selectbox("Model and layer", sites, key="site", bind="query-params")
    listed = [each for each in listed if each.site == site]
    text = middle.segmented_control(
        "Evaluated on", [TEXT, REPEATED], default=TEXT, required=True, key="text", bind="query-params"
    )
    heads = [ALL, *map(str, range(listed[0].n_heads))]
    head = right.selectbox("Head", heads, key="head", bind="query-params")
    head = None if head == ALL else int(head)
    left, right = st.columns([7, 2], vertical_alignment="bottom")
    metric = left.segmented_control(
        "L0 against",
        list(tables.METRICS),
        default="FVU",
        required=True,
        key="y",
        bind="query-params",
        format_func=lambda key: key.replace("_", " "),
    )
    log = right.toggle("Log axes", value=True, key="log", bind="query-params", help="scores stay linear")

    frame = tables.summary(listed, text == REPEATED, head)
    recipes = sorted(frame["recipe"].unique())
    above = st.container()  # the chart stands above what is selected on it
    names = st.multiselect(
        "Selected checkpoints",
        list(frame["name"]),
        key="runs",
        bind="query-params",
        placeholder="All: click a point (shift for several) or drag over some to select them",
    )
    with above:
        draw_frontier(frame, metric, log, head, recipes, names)
    selected = frame[frame["name"].isin(names)] if names else frame
    draw_table(selected)
    draw_curves([each for each in listed if each.name in set(selected["name"])], selected, recipes)


def draw_frontier(
    frame: pd.DataFrame, metric: str, log: bool, head: int | None, recipes: list[str], chosen: list[str]
) -> None:
    """The chart, and which checkpoints are not on it for what reason."""
    measured = frame.dropna(subset=["L0", metric])
    positive = measured["L0"] > 0
    if metric not in tables.SCORES:
        positive &= measured[metric] > 0
    shown = measured[positive] if log else measured
    if len(shown):
        drawn = shown.assign(front=tables.pareto(shown, metric), chosen=shown["name"].isin(chosen) | (not chosen))
        st.altair_chart(
            tradeoff_charts.tradeoff(drawn, metric, log, recipes, head),
            width="stretch",
            key="frontier",
            on_select=partial(select, shown[["name", "L0", metric]]),
        )
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


def draw_table(frame: pd.DataFrame) -> None:
    """Figures and costs."""
    costs = ["parameters", "tokens_seen", "training_minutes"]
    hidden = {"training_seconds", "block", "model", "hook_layer"}
    first = ["name", "recipe", "sparsity", "L0", "FVU", "CE_score", "KL_score", *costs, "status", "figures", "MSE"]
    st.dataframe(
        frame.assign(training_minutes=frame["training_seconds"] / 60),
        hide_index=True,
        width="stretch",
        column_order=[*first, *(c for c in frame if c not in {*first, *hidden})],
        column_config={
            "name": st.column_config.TextColumn(pinned=True),
            "L0": st.column_config.NumberColumn(format="%.1f"),
            "FVU": st.column_config.NumberColumn(format="%.3f"),
            **{
                key: st.column_config.NumberColumn(key.replace("_", " "), format="%.3f")
                for key in ("CE_score", "CE_score_se", "KL_score", "KL_score_se")
            },
            "MSE": st.column_config.NumberColumn(format="%.4g"),
            "MSE_per_dim": st.column_config.NumberColumn("MSE per dim", format="%.3g"),
            "dead_fraction": st.column_config.NumberColumn("dead", format="percent"),
            "n_tokens": st.column_config.NumberColumn("evaluated on", format="localized"),
            "parameters": st.column_config.NumberColumn(format="localized"),
            "tokens_seen": st.column_config.NumberColumn("training tokens", format="localized"),
            "training_minutes": st.column_config.NumberColumn("training minutes", format="%.1f"),
            "d_sae": st.column_config.NumberColumn("features", format="localized"),
        },
    )
    st.caption(
        "Training minutes are the sum over the log of tokens by tokens per second: SAEs of one command train together, "
        "and each has the time of all of them; harvesting and evaluating are not in it. Empty: not known."
    )


def draw_curves(listed: list[Checkpoint], frame: pd.DataFrame, recipes: list[str]) -> None:
    """The training curves of the selected checkpoints."""
    left, right = st.columns([5, 2], vertical_alignment="bottom")
    left.subheader("Training curves")
    try:
        curves = tables.curves(listed)
    except CheckpointError as error:  # metrics.jsonl is damaged
        st.error(str(error))
        return
    figures = [name for name in curves.columns if name not in ("name", "step", "tokens")]
    if not figures:
        st.caption("Nothing was logged for the selected checkpoints: select others on the chart above.")
        return
    comparable = figures.index("FVU") if "FVU" in figures else 0  # recipes have different losses
    figure = right.selectbox("Figure", figures, index=comparable, key="curve", bind="query-params")
    curves = tables.thinned(curves, figure).merge(frame[["name", "recipe"]], on="name")
    st.altair_chart(tradeoff_charts.training_curves(curves, figure, recipes), width="stretch")


page()
