"""The held-out figures of one checkpoint, in total and head by head."""

from typing import Any

import streamlit as st

from analysis.runs import tables
from pages.charts import heads as charts
from pages.charts.common import PALETTE
from pages.charts.compare import l0_histograms
from pages.shared.pick import pick_text
from trainer.checkpoint import Checkpoint

_PANELS = {
    "FVU": "FVU of the head",
    "KL_score": "KL score, only this head replaced",
    "CE_score": "CE score, only this head replaced",
    "norm_ratio": "Norm ratio ‖ẑ‖/‖z‖",
    "silent_fraction": "Silent features (share)",
}


def show(checkpoint: Checkpoint, figures: dict[str, Any]) -> None:
    """Pick a text of eval.json, and draw its figures, L0 per token, and figures per head."""
    if pick_text():
        figures = figures["induction"]
    _totals(figures)
    st.subheader("L0 per token")
    histograms = tables.histograms(figures).assign(name=checkpoint.name)
    if checkpoint.is_dense:
        st.caption("A dense SAE has no heads of its own: one panel for all of it.")
        histograms = histograms.assign(head="all heads")
    st.altair_chart(l0_histograms(tables.binned(histograms), {checkpoint.name: PALETTE[0]}), width="content")
    st.caption("The last bin of a panel holds all larger values too.")
    _per_head(checkpoint, figures)


def _totals(figures: dict[str, Any]) -> None:
    scores = {name: figures[f"{name}_score"] for name in ("CE", "KL")}
    of = "" if figures.get("n_contexts") is None else f" in {figures['n_contexts']:,} contexts"
    of += f" of {figures['n_documents']:,} documents" if figures.get("n_documents") else ""
    error = "± one standard error, clustered by context"
    with st.container(horizontal=True):
        for name, digits, what in (
            ("L0", 1, "mean active features per token, all heads"),
            ("FVU", 3, "fraction of variance unexplained"),
        ):
            st.metric(name, tables.with_error(figures, name, digits), border=True, help=f"{what}; {error}")
        for name in (name for name, score in scores.items() if score is not None):
            st.metric(f"{name} score", tables.with_error(figures, f"{name}_score"), border=True, help=error)
        if figures.get("norm_ratio") is not None:
            bias = tables.with_error(figures, "bias")
            what = f"shrinkage: mean of ‖ẑ‖/‖z‖; {error}. Reconstruction bias Σ‖ẑ‖²/Σẑ·z: {bias}"
            st.metric("Norm ratio", tables.with_error(figures, "norm_ratio"), border=True, help=what)
        silent = f"{figures['silent_fraction']:.1%}"
        st.metric(
            f"Silent on {figures['n_tokens']:,} tokens", silent, border=True, help="of features; not the dead ones"
        )
    for name, score in scores.items():
        if score is None:
            st.caption(f"No {name} score: zero ablation of the layer costs less than 3 standard errors on this text.")
        elif word := tables.outside(score):
            st.caption(f"The {name} score is {word}.")
    losses = " · ".join(
        f"{key} {tables.with_error(figures, f'CE_{key}', 4)}" for key in ("clean", "sae", "zero", "mean")
    )
    st.caption(
        f"CE (nats): {losses} · on {figures['n_tokens']:,} tokens{of}; errors of sae, zero and mean are paired against "
        "clean"
    )


def _per_head(checkpoint: Checkpoint, figures: dict[str, Any]) -> None:
    st.subheader("Per head")
    if "n_tokens_per_head" in figures:
        st.caption(f"Scores with one head replaced are measured on the first {figures['n_tokens_per_head']:,} tokens.")
    frame = tables.per_head(figures, checkpoint.n_heads)
    columns = st.columns(2)
    drawn = [metric for metric in _PANELS if frame[metric].notna().any()]
    for index, metric in enumerate(drawn):
        with columns[index % 2]:
            st.markdown(f"**{_PANELS[metric]}**")
            st.altair_chart(charts.per_head_bars(frame, metric, metric.replace("_", " ")), width="stretch")
            unmeasured = frame.loc[frame[metric].isna(), "head"].tolist()
            if unmeasured:
                st.caption(f"not measurable on this text: heads {', '.join(map(str, unmeasured))}")
    for metric in [metric for metric in _PANELS if metric not in drawn]:
        why = (
            "has no meaning for a dense SAE" if metric == "silent_fraction" else "of no head is measurable on this text"
        )
        st.caption(f"{_PANELS[metric]}: {why}.")
    frame = frame.dropna(axis="columns", how="all")
    st.dataframe(frame, hide_index=True)  # with all digits
