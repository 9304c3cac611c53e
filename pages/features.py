"""Every feature of a checkpoint: a browser over all of them, and the dashboard of one."""

import streamlit as st

from analysis.labels import Labels
from pages.sections import dashboard, feature_browser
from pages.shared import live
from pages.shared.page import begin, sentences
from pages.shared.pick import pick_checkpoint, readable

begin(
    "Features",
    "What each feature fires on, where it reads from and what it writes. Filter, pick a row, and walk through its "
    "dashboard below.",
)
checkpoint = pick_checkpoint(readable(), "Checkpoint", "checkpoint")
analysis = live.analysis_or_hint(checkpoint)
if analysis is None:
    st.stop()
labels = Labels(checkpoint.path)

with sentences():
    fitting, on_page = feature_browser.show(checkpoint, analysis, labels)
    dashboard.show(analysis, labels, fitting)
left, right = st.columns(2)
with left.expander("Labels: export and import"):
    dashboard.exchange(labels, len(analysis.features), checkpoint.name)
with right.expander("The features above as one sae-vis page"):
    dashboard.sae_vis_page(checkpoint, on_page)
