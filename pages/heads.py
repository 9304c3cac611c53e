"""One checkpoint, head by head: what each head does; sparsity, error and effect on the model."""

import streamlit as st

from pages.sections import head_figures, head_overview, roles
from pages.shared import live
from pages.shared.page import begin, sentences
from pages.shared.pick import choose, pick_checkpoint, readable

OF_ANALYSIS = {
    "Overview": head_overview.show,
    "Monosemanticity": roles.monosemanticity,
    "Redundancy across heads": roles.redundancy,
}
VIEWS = ["Overview", "Figures", "Monosemanticity", "Redundancy across heads"]

begin("Heads", "What each head does, what it costs, and how much of it its features keep.")
checkpoints = readable()
with st.container(horizontal=True):  # one below the other where they do not fit
    checkpoint = pick_checkpoint(checkpoints, "Checkpoint", "checkpoint")
    view = choose("Show", VIEWS, "show")

analysis = None if view == "Figures" else live.analysis_or_hint(checkpoint)
if analysis is not None:
    with sentences():
        OF_ANALYSIS[view](checkpoint, analysis)
elif view in ("Figures", "Overview"):  # without an analysis the figures are what there is to see
    figures = live.figures_or_hint(checkpoint)
    if figures is not None:
        head_figures.show(checkpoint, figures)
