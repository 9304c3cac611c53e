"""A prompt through one checkpoint: what fires, where it reads from, and what happens without it."""

from pages.sections import ablation, prompt_features, prompt_heads
from pages.shared import live
from pages.shared.page import begin
from pages.shared.pick import pick_checkpoint, pick_prompt, readable

begin(
    "Prompt",
    "Type a prompt: the map counts the features that fire in each head at each token. Click a cell or pick a head and "
    "a token, then a feature, to see which earlier tokens it reads from and what changes without it.",
)
checkpoint = pick_checkpoint(readable(), "Checkpoint", "checkpoint")
prompt = pick_prompt()
run = live.run_prompt(checkpoint, prompt)

firings = prompt_features.pick_firings(checkpoint, prompt, run)
firing = prompt_features.pick_firing(checkpoint, run, firings)
ablation.show(checkpoint, prompt, run, firing)
prompt_heads.show(run)
