"""A prompt through one checkpoint: what fires, where it reads from, and what happens without it."""

import streamlit as st

from pages.sections import ablation, prompt_features, prompt_heads, prompt_text
from pages.shared import live
from pages.shared.page import begin
from pages.shared.pick import pick_checkpoint, pick_prompt, readable

begin(
    "Prompt",
    "Type a prompt and hover its tokens to see what they read. Click a head and a token, then a feature, to see which "
    "earlier tokens it reads from and what changes without it.",
)
checkpoints = readable()
left, right = st.columns([2, 3])
with left:
    checkpoint = pick_checkpoint(checkpoints, "Checkpoint", "checkpoint")
with right:
    prompt = pick_prompt()
run = live.run_prompt(checkpoint, prompt)

text = st.container()
head, span = prompt_features.pick_place(run)
firings = prompt_features.rank_firings(checkpoint, prompt, run, head, span)
firing = prompt_features.pick_firing(checkpoint, run, firings)
with text:
    prompt_text.show(run, head, span, firing)
ablation.show(checkpoint, prompt, run, firing)
prompt_features.draw_map(run)
prompt_heads.show(run)
