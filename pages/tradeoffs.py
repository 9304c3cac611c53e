"""Every checkpoint as a point: how sparse it is against how faithful."""

import streamlit as st

from pages.sections import frontier
from pages.shared.address import permalink
from pages.shared.page import begin
from pages.shared.pick import readable


@st.fragment(run_every="5s")  # a run that is still training moves, and a new one appears
@permalink()
def page() -> None:
    """What follows the title."""
    checkpoints, figures = frontier.pick(readable())
    selected = frontier.show(figures)
    frontier.table(selected)
    frontier.training_curves(checkpoints, selected, figures.recipes)


begin(
    "Tradeoffs",
    "Each point is a checkpoint: fewer active features against a better reconstruction. CE and KL scores splice the "
    "reconstruction into the model; bars are one standard error, and a line joins the points of a recipe that no other "
    "point of it beats.",
)
page()
