"""Trainings in the checkpoint folder: how far they are, the commands that repeat or resume them, and new ones."""

import streamlit as st

from pages.sections import run_form, run_overview
from pages.shared.page import begin

begin(
    "Runs",
    "Trainings in the checkpoint folder, also those in progress, with the commands that repeat or resume them; and a "
    "form for new ones.",
)
above = st.container()  # drawn last: where there is no checkpoint yet the page ends there, and the form is wanted most
run_form.show()
run_form.started()
with above:
    run_overview.show()
