"""Every checkpoint as a point: how sparse it is against how faithful."""

import streamlit as st

from analysis import tables
from pages import charts, common
from trainer import checkpoint

common.begin(
    "Tradeoffs",
    "Each point is a checkpoint: fewer active features against a better reconstruction. CE and KL scores splice the "
    "reconstruction into the model; bars are one standard error.",
)


@st.fragment(run_every="5s")  # a run that is still training moves, and a new one appears
def page() -> None:
    try:
        draw()
    except checkpoint.CheckpointError as error:  # metrics.jsonl is damaged
        st.error(str(error))


def draw() -> None:
    frame = tables.summary(common.readable())
    frame["site"] = frame["model"] + " layer " + frame["hook_layer"].astype(str)
    left, middle, right = st.columns([2, 4, 1], vertical_alignment="bottom")
    sites = sorted(frame["site"].unique())
    site = left.selectbox("Model and layer", sites, key="site", bind="query-params")
    metric = middle.segmented_control(
        "L0 against",
        list(tables.METRICS),
        default="FVU",
        required=True,
        key="y",
        bind="query-params",
        format_func=lambda key: key.replace("_", " "),
    )
    frame = frame[frame["site"] == site].drop(columns="site")
    wide = frame["L0"].max() > 10 * frame["L0"].min()
    log = right.toggle("Log axes", value=bool(wide), key="log", bind="query-params")

    shown = frame.dropna(subset=["L0", metric])
    hidden = sorted(set(frame["name"]) - set(shown["name"]))
    if len(shown):
        st.altair_chart(charts.tradeoff(shown, metric, log), width="stretch")
    if hidden:
        why = " (CE score: zero ablation is within 3 standard errors of no effect)" if metric == "CE_score" else ""
        st.caption(f"Not measurable on this text, or not measured yet{why}: {', '.join(hidden)}")

    st.subheader("Training curves")
    left, right = st.columns([4, 2])
    names = left.multiselect(
        "Checkpoints", list(frame["name"]), default=list(frame["name"])[:4], key="runs", bind="query-params"
    )
    curves = tables.curves([common.folder() / name for name in names])
    figures = [name for name in curves.columns if name not in ("name", "step", "tokens")] or ["loss"]
    figure = right.selectbox("Figure", figures, key="curve", bind="query-params")
    if len(curves):
        st.altair_chart(charts.training_curves(curves.dropna(subset=[figure]), figure), width="stretch")
    else:
        st.caption("Pick checkpoints to draw their training curves.")

    st.subheader("All checkpoints of this layer")
    st.dataframe(frame, hide_index=True, width="stretch")


page()
