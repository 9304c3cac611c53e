"""Every feature of a checkpoint: a browser over all of them, and the dashboard of one."""

import streamlit as st

from analysis.store import Analysis
from pages.sections import dashboard, feature_browser, notes
from pages.shared import live
from pages.shared.address import permalink
from pages.shared.page import HALVES, begin, sentences
from pages.shared.pick import pick_checkpoint, readable
from trainer.checkpoint import Checkpoint


@st.fragment  # what is searched and picked draws only this again
@permalink()
def browse(checkpoint: Checkpoint, analysis: Analysis) -> None:
    """The features that fit the filters, beside the dashboard of one of them."""
    with st.container(key=HALVES):
        left, right = st.columns([5, 7])
    with sentences():
        with left, st.container(key="beside"):  # it stays where it is while the dashboard is scrolled
            fitting = feature_browser.pick_fitting(checkpoint, analysis)
            feature = feature_browser.pick_feature(analysis, fitting["feature"].tolist())
            on_page = feature_browser.show(checkpoint, analysis, fitting, feature)
            with st.expander("The features above as a file"):
                dashboard.export(fitting, checkpoint.name)
            with st.expander("Labels and comments: export and import"):
                notes.exchange(checkpoint)
            with st.expander("The features above as one sae-vis page"):
                dashboard.sae_vis_page(checkpoint, on_page)
        with right:
            dashboard.show(checkpoint, analysis, feature)


begin("Features", "What each feature fires on, where it reads from and what it writes.")
checkpoints = readable()
with st.container(horizontal=True):
    checkpoint = pick_checkpoint(checkpoints, "Checkpoint", "checkpoint")
analysis = live.analysis_or_hint(checkpoint)
if analysis is None:
    st.stop()
browse(checkpoint, analysis)
