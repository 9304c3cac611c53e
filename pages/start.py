"""Where one starts: what this is, the heads of one checkpoint, an example in three clicks, and the words used."""

import streamlit as st

from pages.sections import glossary, start
from pages.shared import live
from pages.shared.page import begin, sentences
from pages.shared.pick import pick_checkpoint, readable

begin(
    "Start",
    "What does each attention head do? A sparse autoencoder (SAE) takes what the heads of a layer write apart into "
    "features. Block-diagonal SAEs give each feature to one head.",
)
top = st.container()
glossary.show()  # also where there is nothing else to show
with top:
    checkpoints = readable()
    left, right = st.columns([2, 3], vertical_alignment="bottom")
    with left, st.container(horizontal=True):
        # no other page calls it so: what two pages call alike, Streamlit takes out of a link
        checkpoint = pick_checkpoint(checkpoints, "Checkpoint", "sae")
    with right:
        start.describe(checkpoint)
    analysis = live.analysis_or_hint(checkpoint)
    with sentences():
        start.heads(checkpoint, analysis)
        if analysis is None:
            start.without_analysis(checkpoint)
        else:
            start.example(checkpoint, analysis)
