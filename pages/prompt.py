"""A prompt through one checkpoint: what fires, where it reads from, and what happens without it."""

import streamlit as st

from analysis.prompt.run import PromptRun
from pages.sections import interventions, prompt_features, prompt_heads, prompt_text
from pages.shared import live
from pages.shared.address import permalink
from pages.shared.page import HALVES, begin
from pages.shared.pick import pick_checkpoint, pick_prompt, readable
from trainer.checkpoint import Checkpoint


@st.fragment(key=prompt_features.EXPLORE)  # what is chosen on a prompt draws only this again
@permalink()
def explore(checkpoint: Checkpoint, prompt: str, run: PromptRun) -> None:
    """The prompt as text, the features that fire on it, and one of them."""
    text = st.container()
    head, span, features, firing = prompt_features.pick(checkpoint, prompt, run)
    with text:
        prompt_text.show(prompt, run, head, span, firing)
    with st.container(key=HALVES):
        left, right = st.columns([11, 8])
    with left:
        prompt_features.show(checkpoint, run, features, firing)
    with right:
        if firing is not None:
            prompt_features.show_sources(checkpoint, run, firing)
        interventions.show(checkpoint, prompt, run, head, span, firing)


begin(
    "Prompt",
    "Hover the tokens to see what they read. Click a head and a token, then a feature: where it reads from, and what "
    "changes without it.",
)
checkpoints = readable()
left, right = st.columns([2, 3])
with left, st.container(horizontal=True):
    checkpoint = pick_checkpoint(checkpoints, "Checkpoint", "checkpoint")
prompt = pick_prompt(right, left, (*prompt_features.CHOSEN, *interventions.CHOSEN))
run = live.run_prompt(checkpoint, prompt)
above = st.container()
prompt_features.draw_map(run)
prompt_heads.show(run)
with above:  # last: where a sentence ends this part, the others are there
    explore(checkpoint, prompt, run)
