"""One checkpoint, head by head: sparsity, error, effect on the model; and what each head does."""

from pages.sections import head_figures, roles
from pages.shared import live
from pages.shared.page import begin, sentences
from pages.shared.pick import choose, pick_checkpoint, readable

OF_ANALYSIS = {
    "Roles": roles.cards,
    "Monosemanticity": roles.monosemanticity,
    "Redundancy across heads": roles.redundancy,
}

begin("Heads", "What each head costs, how much of it its features keep, and what it does.")
checkpoint = pick_checkpoint(readable(), "Checkpoint", "checkpoint")
view = choose("Show", ["Figures", *OF_ANALYSIS], "show")

if view == "Figures":
    figures = live.figures_or_hint(checkpoint)
    if figures is not None:
        head_figures.show(checkpoint, figures)
else:
    analysis = live.analysis_or_hint(checkpoint)
    if analysis is not None:
        with sentences():
            OF_ANALYSIS[view](checkpoint, analysis)
