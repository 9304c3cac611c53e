"""How much of a target its strongest features make alone, beside random ones."""

import streamlit as st

from analysis.prompt.circuit.target import Target
from analysis.runs.sets import LayerSet
from pages.charts import circuit as charts
from pages.shared import circuits
from pages.shared.pick import choose

_MEAN, _ELSEWHERE = "their mean", "what they are on other text"


def faithfulness(of_set: LayerSet, prompt: str, target: Target) -> None:
    """The curve, computed where it is asked for."""
    st.subheader("How much its features make alone", anchor=False)
    st.caption(
        "The strongest features of the prompt by attribution are kept, computed anew from what is left. All others of "
        "all layers stand at something else: at their mean over the text that was analysed, or at what they are at the "
        "same positions of other contexts of it, where also features fire that are silent on the prompt. "
        "1: the target as it is; 0: no feature kept."
    )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        others = choose("All others stand at", [_MEAN, _ELSEWHERE], "others")
        errors = st.toggle("Keep what SAEs leave out", True, key="errors", bind="query-params")
        wanted = st.toggle("Compute it", False, key="curve", bind="query-params", help="a minute for thirty layers")
    if not wanted:
        return
    curve = circuits.faithfulness(of_set, prompt, target, errors, others == _ELSEWHERE)
    if curve is None:
        st.info("It needs an analysis of every layer; a summary is enough.")
        return
    st.altair_chart(charts.faithfulness(curve), width="stretch")
