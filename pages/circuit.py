"""A prediction, taken apart over all layers: the features of heads that make it, what they read, and why there."""

import streamlit as st

from pages.sections import circuit as sections
from pages.sections import circuit_choices as choices
from pages.sections.circuit_faithful import faithfulness
from pages.shared import circuits
from pages.shared.page import begin
from pages.shared.pick import pick_prompt, readable, show_example

begin("Circuit", "Which features of which heads make a prediction, what they read, and why they look there.")
checkpoints = readable()
left, right = st.columns([2, 3])
with left:
    of_set = choices.pick_set(checkpoints)
if of_set is None:
    st.stop()
prompt = pick_prompt(right, left, sections.CHOSEN, choices.TOUR)
nodes = circuits.run(of_set, prompt)
with left:
    target = choices.pick_target(nodes)
with right:
    size = choices.pick_size(target)
show_example(prompt, choices.TOUR, choices.TOUR_OF)
circuit = circuits.traced(of_set, prompt, target, *size)
sections.show(of_set, circuit, choices.token_labels(nodes))
faithfulness(of_set, prompt, target)
