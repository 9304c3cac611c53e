"""What the model predicts on a prompt without a feature, a head, or what the SAE leaves out."""

import pandas as pd
import streamlit as st

from analysis.prompt.run import PromptRun
from pages.sections.prompt_features import tokens
from pages.shared import live
from pages.shared.columns import draw_table
from pages.shared.pick import select
from trainer.checkpoint import Checkpoint

CHOSEN = ("predict",)  # here, which means nothing on another prompt
OF_FEATURE = "the feature chosen above"
_OF_HEAD = {
    "all features of a head": "scale features of head",
    "a head, by its reconstruction": "head by reconstruction",
}
KINDS = {OF_FEATURE: "scale feature", **_OF_HEAD, "the whole layer, by its reconstruction": "layer by reconstruction"}


def show(checkpoint: Checkpoint, prompt: str, run: PromptRun, firing: pd.Series | None) -> None:
    """Pick what is taken away and after which token, and draw the next tokens that change.

    Args:
        firing: the feature chosen above, a row of `active_features`; None where none fires.
    """
    st.markdown("**What changes without it**")
    left, middle, right = st.columns(3)
    what = left.selectbox("Take away or replace", list(KINDS), key="ablate", bind="query-params")
    which, usual, after = 0, "the last token", len(run.strings) - 1
    if what in _OF_HEAD:
        which = middle.selectbox("Which head", list(range(len(run.pattern))), key="which", bind="query-params")
    elif what == OF_FEATURE:
        usual = "where the feature fires"
        if firing is not None:
            which, after = int(firing["feature"]), int(firing["position"])
    options = [usual, *tokens(run)]
    chosen = select(right, "Predict after token", options, "predict")
    if what == OF_FEATURE and firing is None:
        st.caption("Pick a feature above first.")
        return
    st.caption(
        "At every position but BOS. p: the probability as it is. Direct: everything else frozen, the final norm's "
        "scale too. Full: the rest of the model run again. Changes are of the logit and of log p (nats)."
    )
    after = options.index(chosen) or after
    changed = live.ablation(checkpoint, prompt, KINDS[what], which, after)
    best = changed.iloc[0]
    st.text(
        f"After {run.label(after)}: {best['token']} {best['probability']:.1%} as it is, "
        f"{best['full probability']:.1%} without (full), "
        f"{best['direct probability']:.1%} by the direct path alone"
    )
    draw_table(changed, height=320)
