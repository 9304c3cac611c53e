"""Two to four checkpoints side by side: figures, the same prompt in each, and which features are the same."""

from pages.sections import compared, matched
from pages.shared.page import begin
from pages.shared.pick import choose, pick_prompt, readable, show_example

FIGURES, PROMPT, FEATURES = "Figures", "One prompt", "Features"

begin(
    "Compare",
    "Two to four checkpoints side by side: their held-out figures, the same prompt in each, and which features of one "
    "are those of another.",
)
shown = compared.pick(readable())
view = choose("Show", (FIGURES, PROMPT, FEATURES), "show")

if view == FIGURES:
    compared.figures(shown)
    compared.merging(shown)
else:
    prompt = pick_prompt()
    show_example(prompt)
    runs = compared.run(shown, prompt)
    head, position = compared.pick_place(runs)
    if view == PROMPT:
        compared.one_prompt(shown, runs, head, position)
    elif len(shown) > 1:
        matched.show(shown, runs, head, position)
