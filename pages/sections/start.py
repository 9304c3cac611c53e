"""The parts of the Start page that are about one checkpoint."""

from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from analysis.store import Analysis
from pages.shared.page import ARROW, feature_link, plain, small
from pages.shared.pick import EXAMPLES
from trainer.checkpoint import Checkpoint

_PROMPT = EXAMPLES["Induction"][0]
_LAST = "19: \u00b7the"  # its last token, as the embedded model has it; of another model all tokens are shown
_CARD = 116  # pixels: nine heads side by side on a laptop


def describe(checkpoint: Checkpoint) -> None:
    """What was trained on what, and how well it does."""
    sae, model = checkpoint.config.sae, checkpoint.config.model
    of = "shared by all heads (dense)" if checkpoint.is_dense else f"{sae.features_per_block:,} of each head"
    figures = checkpoint.eval
    how = (
        f"On {figures['n_tokens']:,} held-out tokens L0 is {figures['L0']:.1f} and FVU {figures['FVU']:.3f}."
        if figures
        else "It has no held-out figures yet: they come when its training ends."
    )
    st.markdown(
        f"Language model {plain(Path(model.name).name)}, layer {checkpoint.layer}: {model.n_heads} heads of "
        f"{model.d_head} dimensions. The SAE (recipe {plain(checkpoint.recipe)}) has {sae.d_sae:,} features, {of}. "
        f"{how}"
    )


def heads(checkpoint: Checkpoint, analysis: Analysis | None) -> None:
    """A small card per head, which leads to its features; without an analysis to what it does on a prompt."""
    if analysis is None:
        st.markdown("**Its heads** on a prompt")
    else:
        st.markdown("**Its heads**, with what their features read most on text, as a share of all they read (DFA)")
    card: dict[str, Any] = {"border": True, "width": _CARD, "height": "stretch", "horizontal_alignment": "center"}
    with st.container(horizontal=True, gap="xsmall"):
        for head in range(checkpoint.n_heads):
            with st.container(gap=None, **card):
                page = "pages/prompt.py" if analysis is None else "pages/features.py"
                _link(page, f":blue[**Head {head}**]", checkpoint, icon=None, head=str(head))
                if analysis is not None:
                    st.caption(_reads(analysis.heads.iloc[head]), text_alignment="center")


def example(checkpoint: Checkpoint, analysis: Analysis) -> None:
    """Induction in three clicks: a prompt, a feature, all heads."""
    scores = analysis.heads["repeated_attention_induction"]
    head = int(scores.to_numpy().argmax())
    st.markdown("**Induction in three clicks**")
    prompt, feature, overview = (column.container(border=True, height="stretch") for column in st.columns([5, 4, 3]))
    with prompt:
        st.markdown(f"**1 · A prompt:** {plain(_PROMPT)}. What followed an earlier *the* may follow again.")
        st.caption(
            f"Of all heads, head {head} attends most to the token after an earlier copy: {scores[head]:.0%} of its "
            "attention on repeated random tokens."
        )
        _to_prompt(checkpoint, head=str(head))
    with feature:
        of_head = analysis.features[analysis.features["head"] == head]
        found = of_head[of_head["role"] == "induction"].nlargest(1, "firings")
        which = "the most frequent of those" if len(found) else "there is none"
        st.markdown(f"**2 · A feature** of head {head} that reads such tokens most: {which}.")
        for each in found.itertuples():
            small(each.description)
            feature_link(checkpoint, each.feature, f"Feature {each.feature}")
    with overview:
        st.markdown("**3 · All heads:** what they read, their scores, and whether their features agree.")
        _link("pages/heads.py", "Heads", checkpoint)


def without_analysis(checkpoint: Checkpoint) -> None:
    """What one can do before there is an analysis."""
    st.markdown(f"**Induction** on {plain(_PROMPT)}: which head and feature to look at, an analysis will say.")
    with st.container(horizontal=True):
        _to_prompt(checkpoint)
        _link("pages/heads.py", "What each head costs, and how much is kept", checkpoint)


def _to_prompt(checkpoint: Checkpoint, **query: str) -> None:
    _link("pages/prompt.py", "What fires, and what it reads", checkpoint, prompt=_PROMPT, token=_LAST, **query)


def _reads(head: pd.Series) -> str:
    if pd.isna(head["role_dfa"]):
        return "no feature fires"
    slot = head["role_dfa"].replace("_", " ")
    marks = "unclassified" if head["mono_unclassified"] else "near-tie" if head["mono_near_tie"] else ""
    return f"{slot} {head[f'dfa_{head.role_dfa}']:.0%}" + (f", {marks}" if marks else "")


def _link(page: str, label: str, checkpoint: Checkpoint, icon: str | None = ARROW, **query: str) -> None:
    st.page_link(page, label=label, icon=icon, query_params={"checkpoint": checkpoint.name, **query})
