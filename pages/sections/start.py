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
                _link(page, f":blue[**Head {head}**]", checkpoint, icon=None, **_head(checkpoint, head))
                if analysis is not None:
                    st.caption(_reads(analysis.heads.iloc[head]), text_alignment="center")


def example(checkpoint: Checkpoint, analysis: Analysis | None) -> None:
    """Induction in three clicks: a prompt, a feature, all heads."""
    st.markdown("**Induction in three clicks**")
    head = None if analysis is None else int(analysis.heads["repeated_attention_induction"].argmax())
    prompt, feature, overview = (column.container(border=True, height="stretch") for column in st.columns(3))
    with prompt:
        st.markdown(f"**1 · A prompt:** {plain(_PROMPT)}. What followed an earlier *the* may follow again.")
        if analysis is not None:
            share = analysis.heads["repeated_attention_induction"][head]
            st.caption(
                f"Of all heads, head {head} attends most to the token after an earlier copy: {share:.0%} of its "
                "attention on repeated random tokens."
            )
        of = {} if head is None else _head(checkpoint, head)
        _link("pages/prompt.py", "What fires, and what it reads", checkpoint, prompt=_PROMPT, token=_LAST, **of)
    with feature:
        found = None if analysis is None else _inductive(analysis, head)
        if found is not None:
            st.markdown(
                f"**2 · A feature:** of those of head {head} that read such tokens most, the most frequent one."
            )
            small(found["description"])
            feature_link(checkpoint, int(found["feature"]), f"Feature {found['feature']}")
        elif analysis is not None:
            st.markdown(f"**2 · A feature:** none of head {head} reads such tokens most.")
        else:
            st.markdown("**2 · A feature:** which one reads such tokens, an analysis says. There is none yet.")
    with overview:
        what = (
            "what every head reads, its scores and whether its features agree"
            if analysis
            else "what each costs, and how much is kept"
        )
        st.markdown(f"**3 · All heads:** {what}.")
        _link("pages/heads.py", "Heads", checkpoint)


def _inductive(analysis: Analysis, head: int | None) -> pd.Series | None:
    """The most frequent feature of a head whose role is induction."""
    features = analysis.features
    features = features[(features["head"] == head) & (features["role"] == "induction")]
    return None if features.empty else features.loc[features["firings"].idxmax()]


def _reads(head: pd.Series) -> str:
    if pd.isna(head["role_dfa"]):
        return "no feature fires"
    slot = head["role_dfa"].replace("_", " ")
    marks = "unclassified" if head["mono_unclassified"] else "near-tie" if head["mono_near_tie"] else ""
    return f"{slot} {head[f'dfa_{head.role_dfa}']:.0%}" + (f", {marks}" if marks else "")


def _head(checkpoint: Checkpoint, head: int) -> dict[str, str]:
    """The head in an address; the features of a dense SAE have none on the Prompt page."""
    return {} if checkpoint.is_dense else {"head": str(head)}


def _link(page: str, label: str, checkpoint: Checkpoint, icon: str | None = ARROW, **query: Any) -> None:
    st.page_link(page, label=label, icon=icon, query_params={"checkpoint": checkpoint.name, **query})
