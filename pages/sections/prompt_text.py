"""The prompt as text, and the patterns of its heads."""

import pandas as pd
import streamlit as st

from analysis.prompt.patterns import FEATURE, KINDS, drawn, matrices
from analysis.prompt.run import PromptRun
from pages.components.reading import reading
from pages.shared.pick import ALL, choose, put, show_example
from pages.shared.strips import spaced

_DENSE_HEAD = "head shown"  # a dense SAE has features of no head, but its model has heads


def show(prompt: str, run: PromptRun, head: int | None, span: tuple[int, int] | None, firing: pd.Series | None) -> None:
    """Tokens and patterns: a click on one picks it as the boxes below do, a click with shift a span."""
    with st.container(horizontal=True, vertical_alignment="center", key="above_text"):
        kind = choose("What a token reads", KINDS, "reads", label_visibility="collapsed", width="content")
        show_example(prompt)
    feature = None
    if kind == FEATURE:
        if firing is None:
            st.info("No feature fires here: pick another head or token, or show attention.")
            return
        feature = int(firing["head"]), int(firing["feature"]) % run.features_per_block
    if run.dense:
        head = st.session_state.get(_DENSE_HEAD)

    def picked(first: int, last: int) -> None:
        put("token", run.labels[first])
        put("until", run.labels[last])

    def picked_head(clicked: int | None) -> None:
        if run.dense:
            put(_DENSE_HEAD, clicked)
        else:
            put("head", ALL if clicked is None else str(clicked))

    what = kind if feature is None or firing is None else f"DFA of feature {firing['feature']}"
    tokens, patterns = [spaced(each) for each in run.strings], drawn(matrices(run, kind, feature), head)
    reading(tokens, patterns, what, head, span, "reading", picked, picked_head)
