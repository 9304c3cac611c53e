"""The words that the pages use, each in a line."""

import streamlit as st

_WORDS = {
    "Head": "one of the parallel parts of an attention layer: it looks at earlier tokens and writes what it reads",
    "hook_z": "what a head hands to its output matrix, as TransformerLens calls it; the SAE reconstructs it",
    "Feature": "a direction that the SAE has learnt; where its activation is above 0 it fires",
    "L0": "how many features fire on a token, on average",
    "FVU": "fraction of variance unexplained: what the SAE leaves out of hook_z; 0 is nothing",
    "DFA": "direct feature attribution: a feature's input, split exactly over the tokens that its head reads",
    "Slot": "the kind of such a token: induction is the one after an earlier copy of this one",
    "k": "features that fire on a token (topk), or do so on average (batchtopk): over all heads, or in each "
    "(`k_scope`)",
    "λ": "`l1_coefficient`, the weight of the sparsity penalty of other recipes: a larger one leaves fewer features",
    "april": "a recipe: Anthropic's L1 loss of April 2024",
    "reference": "april with the settings of shehper/attn_saes",
    "Dead, silent": "dead: has not fired for a long stretch of training; silent: fires on none of the tokens evaluated",
}


def show() -> None:
    """All of them, in two columns."""
    st.markdown("**Words**")
    lines = [f"**{word}**: {meaning}." for word, meaning in _WORDS.items()]
    half = -(-len(lines) // 2)
    for column, part in zip(st.columns(2), (lines[:half], lines[half:]), strict=True):
        column.caption("\n".join(f"- {line}" for line in part))
