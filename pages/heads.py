"""One checkpoint, head by head: sparsity, error, effect on the model; and what each head does."""

import streamlit as st

from analysis.runs import tables
from pages.charts import common as charts
from pages.sections import roles
from pages.shared import common

SECTIONS = {
    "Roles": roles.cards,
    "Monosemanticity": roles.monosemanticity,
    "Redundancy across heads": roles.redundancy,
}

common.begin("Heads", "What each head costs, how much of it its features keep, and what it does.")

listed = common.pick_checkpoint(common.readable(), "Checkpoint", "checkpoint")
section = st.segmented_control(
    "Show", ["Figures", *SECTIONS], default="Figures", required=True, key="show", bind="query-params"
)
if section in SECTIONS:
    analysis = common.analysis_or_hint(listed)
    if analysis is not None:
        with common.sentences():
            SECTIONS[section](listed, analysis)
    st.stop()

figures = common.evaluation(listed)
if figures is None:
    st.stop()
(figures,) = common.pick_text([figures])

with st.container(horizontal=True):
    st.metric("L0", f"{figures['L0']:.1f}", border=True, help="mean active features per token, all heads")
    st.metric("FVU", f"{figures['FVU']:.3f}", border=True, help="fraction of variance unexplained")
    for name in ("CE", "KL"):
        score, error = figures[f"{name}_score"], figures[f"{name}_score_se"]
        text = "not measurable" if score is None else f"{score:.3f} ± {error:.3f}"
        st.metric(
            f"{name} score",
            text,
            border=True,
            help="± one standard error, paired per token against clean; not measurable where zero ablation is within 3 "
            "standard errors of no effect",
        )
    st.metric("Dead features", f"{figures['dead_fraction']:.1%}", border=True, help="never fire on these tokens")
ces = " · ".join(
    f"{key} {figures[f'CE_{key}']:.4f} ± {figures[f'CE_{key}_se']:.4f}" for key in ("clean", "sae", "zero", "mean")
)
st.caption(
    f"CE (nats): {ces} · on {figures['n_tokens']:,} tokens; errors of sae, zero and mean are paired against clean"
)

st.subheader("L0 per token")
dense = listed.is_dense
if dense:
    st.caption("A dense SAE has no heads of its own: one panel for all of it.")
histograms = tables.histograms(figures)
st.altair_chart(charts.l0_histograms(histograms.assign(head="all heads") if dense else histograms))

st.subheader("Per head")
frame = tables.per_head(figures, listed.n_heads)
panels = {
    "FVU": "FVU of the head",
    "KL_score": "KL score, only this head replaced",
    "CE_score": "CE score, only this head replaced",
    "dead_fraction": "Dead features (share)",
}
if "n_tokens_per_head" in figures:
    st.caption(f"Scores with one head replaced are measured on the first {figures['n_tokens_per_head']:,} tokens.")
columns = st.columns(2)
for index, (metric, title) in enumerate(panels.items()):
    with columns[index % 2]:
        st.markdown(f"**{title}**")
        if frame[metric].notna().any():
            st.altair_chart(charts.per_head_bars(frame, metric, metric.replace("_", " ")), width="stretch")
        unmeasured = frame.loc[frame[metric].isna(), "head"].tolist()
        if unmeasured:
            why = "has no meaning for a dense SAE" if metric == "dead_fraction" else "not measurable on this text"
            st.caption(f"{why}: heads {', '.join(map(str, unmeasured))}")
st.dataframe(frame, hide_index=True, width="stretch")
