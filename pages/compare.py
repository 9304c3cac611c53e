"""Two checkpoints side by side: figures, per-head L0, and the same prompt in both."""

import pandas as pd
import streamlit as st

from analysis import prompt as analysis
from analysis import tables
from pages import charts, common

common.begin("Compare", "Two checkpoints side by side: their held-out figures, and the same prompt in both.")

available = common.readable()
left, right = st.columns(2)
with left:
    first = common.pick_checkpoint(available, "First checkpoint", "a")
with right:
    second = common.pick_checkpoint(available, "Second checkpoint", "b", index=1)
if first.path == second.path:
    st.info("Both are the same checkpoint: pick another one to compare it with.")
for key, what in (("model", "the same model and layer"), ("text", "the same text")):
    if first.config[key] != second.config[key]:
        st.warning(f"The two were not trained on {what}: compare their figures with care.")

st.subheader("Figures")
both = [common.evaluation(first), common.evaluation(second)]
if all(both):
    chosen = common.pick_text(both)
    counts = [figures["n_tokens"] for figures in chosen]
    if counts[0] != counts[1]:
        st.warning(
            f"Evaluated on {counts[0]:,} and {counts[1]:,} tokens: retrain with the same --eval_tokens to compare."
        )
    keys = ["L0", "MSE", "FVU", "CE_sae", "CE_score", "KL_sae", "KL_score", "dead_fraction"]
    rows = [{"figure": key, "first": chosen[0][key], "second": chosen[1][key]} for key in keys]
    frame = pd.DataFrame(rows).astype({"first": float, "second": float})
    frame["second - first"] = frame["second"] - frame["first"]
    st.dataframe(frame, hide_index=True, width="stretch")
    st.caption("An empty cell is a score that is not measurable on this text.")
    histograms = [
        tables.histograms(figures).assign(name=f"{label}: {each.path.name}")
        for label, figures, each in zip(("first", "second"), chosen, (first, second), strict=True)
    ]
    st.subheader("L0 per token")
    st.altair_chart(charts.l0_histograms(pd.concat(histograms)))

st.subheader("The same prompt in both")
prompt = common.prompt_box()
for column, each in zip(st.columns(2), (first, second), strict=True):
    with column:
        st.markdown(f"**{each.path.name}**")
        run = common.prompt_run(each, prompt)
        st.altair_chart(charts.firing_map(analysis.firing_map(run)), width="stretch")
        common.show_role_table(analysis.roles(run))
        st.dataframe(
            analysis.active_features(run, None, None, limit=50),
            hide_index=True,
            width="stretch",
            height=260,
            column_order=["feature", "head", "token", "activation", "reads from", "slot"],
        )
