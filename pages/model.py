"""Where one starts: every head of a model at a glance, found by what it does."""

import streamlit as st

from pages.sections import model_heads
from pages.shared.page import ARROW, begin, sentences
from pages.shared.pick import readable

begin("Model", "What does each attention head do? Every head of a model, without SAEs and with them.")
with sentences():
    shown = model_heads.pick(readable(required=False))
    if shown is None:
        readable()
    else:
        st.page_link("pages/start.py", label="New here? Induction in three clicks, and the words used", icon=ARROW)
        model_heads.overview(shown)
        model_heads.finder(shown)
        model_heads.one_head(shown)
