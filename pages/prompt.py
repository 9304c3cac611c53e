"""A prompt through one checkpoint: which features of which head fire, and where they read from."""

from functools import partial

import streamlit as st

from analysis import prompt as analysis
from pages import charts, common

ALL = "all"

common.begin(
    "Prompt",
    "Type a prompt: the map counts the features that fire in each head at each token. Pick a head or a token, then a "
    "feature, to see which earlier tokens it reads from (direct feature attribution, exact for one head).",
)

listed = common.pick_checkpoint(common.readable(), "Checkpoint", "checkpoint")
run = common.prompt_run(listed, common.prompt_box())
n_blocks = run.f.shape[1]


def pick_cell() -> None:
    """A click on the map chooses its head and token."""
    cells = st.session_state["map"]["selection"]["cell"]
    st.session_state["head"] = str(cells[0]["head"]) if cells else ALL
    st.session_state["token"] = run.label(cells[0]["position"]) if cells else ALL


def pick_row(names: list[str]) -> None:
    """A click on the table chooses its feature."""
    rows = st.session_state["table"]["selection"]["rows"]
    if rows:
        st.session_state["feature"] = names[rows[0]]


st.subheader("Features that fire")
st.altair_chart(
    charts.firing_map(analysis.firing_map(run)), width="stretch", key="map", on_select=pick_cell, selection_mode="cell"
)
left, right = st.columns(2)
heads = [ALL, *map(str, range(n_blocks))]
tokens = [ALL, *(run.label(position) for position in range(1, len(run.strings)))]
head = left.selectbox("Head", heads, key="head", bind="query-params")
token = right.selectbox("Token", tokens, key="token", bind="query-params")

block = None if head == ALL else int(head)
position = None if token == ALL else tokens.index(token)
features = analysis.active_features(run, block, position)
if features.empty:
    st.info("No feature fires here. Pick another head or token, or a checkpoint with a higher L0.")
else:
    names = [f"{f}@{p}" for f, p in zip(features["feature"], features["position"], strict=True)]
    st.dataframe(
        features,
        hide_index=True,
        width="stretch",
        height=300,
        key="table",
        on_select=partial(pick_row, names),
        selection_mode="single-row",
        column_config={
            "share": st.column_config.ProgressColumn("share of the head", format="percent", min_value=0, max_value=1),
            "source share": st.column_config.NumberColumn("share of its DFA", format="percent"),
            "activation": st.column_config.NumberColumn(format="%.3f"),
        },
    )
    st.subheader("Where a feature reads from")
    chosen = st.selectbox("Feature @ position", names, key="feature", bind="query-params")
    row = features.iloc[names.index(chosen)]
    sources = analysis.source_attribution(
        run, int(row["head"]), int(row["feature"]) % run.features_per_block, int(row["position"])
    )
    if len(sources) > 60:
        strongest = sources.reindex(sources["dfa"].abs().nlargest(60).index).sort_index()
        st.caption(f"The 60 sources with the largest |DFA| of {len(sources)}, in order.")
        sources = strongest
    owner = "of all heads" if run.dense else f"of head **{row['head']}**"
    st.markdown(
        f"Feature **{row['feature']}** {owner} at `{row['token']}` "
        f"fires with {row['activation']:.3f}; its largest source is `{row['reads from']}` ({row['slot']})."
    )
    st.altair_chart(charts.source_strips(sources))

st.subheader("What each head does on this prompt")
st.caption(
    "Shares over all destinations but BOS. Attention: where the head looks. DFA: what the features that fire read. "
    "Slots are exclusive; the first that applies counts: bos, self, induction (after an earlier copy of this token), "
    "duplicate (an earlier copy), previous, local (2 to 5 back), other."
)
shares = analysis.roles(run)
st.altair_chart(charts.roles(shares))
common.show_role_table(shares)
