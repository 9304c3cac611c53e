"""What the model predicts, and writes, with a feature or a head of a prompt changed."""

from typing import Any, NamedTuple

import pandas as pd
import streamlit as st

from analysis.prompt.continuation import Continuation
from analysis.prompt.effect import Effect
from analysis.prompt.intervene import Intervention
from analysis.prompt.patch import Patch, proposed_shift
from analysis.prompt.run import PromptRun
from analysis.tokens import visible
from pages.charts import prompt as charts
from pages.sections.prompt_features import tokens
from pages.shared import live, strips
from pages.shared.columns import draw_table
from pages.shared.pick import number, select
from trainer.checkpoint import Checkpoint

CHOSEN = ("predict", "wanted", "against", "amount", "where", "other", "shift")  # means nothing on another prompt
FEATURE, FEATURES, HEAD, LAYER = "the feature", "all features of its head", "its head", "the whole layer"
AWAY, SCALE, CLAMP, RECONSTRUCT, PATCH = (
    "take away", "scale", "clamp", "by its reconstruction", "as in another prompt"
)  # fmt: skip
_HOW = {
    FEATURE: [AWAY, SCALE, CLAMP, PATCH],
    FEATURES: [AWAY, SCALE, PATCH],
    HEAD: [RECONSTRUCT, PATCH],
    LAYER: [RECONSTRUCT, PATCH],
}
_EVERYWHERE, _CHOSEN_TOKENS = "every token", "the chosen tokens"


class Change(NamedTuple):
    """What is changed, as the page asks for it."""

    change: Intervention | Patch
    words: str
    """`Without feature 3 of head 1`"""
    other: str = ""
    """the prompt that a patch is taken from"""


def show(
    checkpoint: Checkpoint,
    prompt: str,
    run: PromptRun,
    head: int | None,
    span: tuple[int, int] | None,
    firing: pd.Series | None,
) -> None:
    """Pick what is changed, and draw what that does to the next token, and to what the model writes.

    Args:
        head: the one chosen above.
        span: the tokens chosen above.
        firing: the feature chosen above, a row of `active_features`; None where none fires.
    """
    st.markdown("**What a change does**")
    left, right = st.columns(2)
    what = left.selectbox("Change", list(_HOW), key="what", bind="query-params")
    how = select(right, "How", _HOW[what], "how")
    if run.dense and what in (FEATURES, HEAD):
        head = st.selectbox("Head", list(range(len(run.pattern))), key="which", bind="query-params")
    elif firing is not None:
        head = int(firing["head"])
    if (what == FEATURE and firing is None) or (what in (FEATURES, HEAD) and head is None):
        st.caption("Pick a feature above first.")
        return
    change = _pick(checkpoint, prompt, run, what, how, head, span, firing)
    if change is None:
        return
    usual, after = "the last token", len(run.strings) - 1
    if what == FEATURE and firing is not None:
        usual, after = "where the feature fires", int(firing["position"])
    left, middle, right = st.columns(3)
    options = [usual, *tokens(run)]
    after = options.index(select(left, "Predict after token", options, "predict")) or after
    wanted = middle.text_input("Target token", key="wanted", bind="query-params", placeholder="\u00b7Mary")
    against = right.text_input("against", key="against", bind="query-params", placeholder="\u00b7John")
    effect = live.effect(checkpoint, prompt, change.change, after, change.other)
    table = live.next_tokens(checkpoint, effect)
    if wanted and against:
        _draw_difference(checkpoint, prompt, run, change, effect, after, (wanted, against))
    best = table.iloc[0]
    st.text(
        f"{change.words}, after {run.labels[after]}: {best['token']} {best['full probability']:.1%} (full), "
        f"{best['direct probability']:.1%} by the direct path alone; {best['probability']:.1%} as it is."
    )
    hidden = {"direct logit change": None, "direct log-probability change": None}
    draw_table(table, hidden, height=215)
    st.caption(
        "Never at BOS. p: the probability as it is. Direct: everything else frozen, the final norm's scale too. Full: "
        "the rest of the model run again. Changes are of the logit and of log p (nats)."
    )
    if isinstance(change.change, Intervention):
        _continue(checkpoint, prompt, change)


def _pick(
    checkpoint: Checkpoint,
    prompt: str,
    run: PromptRun,
    what: str,
    how: str,
    head: int | None,
    span: tuple[int, int] | None,
    firing: pd.Series | None,
) -> Change | None:
    """The rest of the choices; None where one is missing."""
    which = int(firing["feature"]) if what == FEATURE and firing is not None else head or 0
    of_head = "" if run.dense else f" of head {head}"
    name = {
        FEATURE: f"feature {which}{of_head}",
        FEATURES: f"all features of head {head}",
        HEAD: f"head {head}",
        LAYER: "the whole layer",
    }[what]
    left, right = st.columns(2)
    place: dict[str, Any] = {}
    if span is not None and select(left, "At", [_EVERYWHERE, _CHOSEN_TOKENS], "where") == _CHOSEN_TOKENS:
        place = {"first": span[0], "last": span[1]}
        name += f" at {run.labels[span[0]]}" + (f" to {run.labels[span[1]]}" if span[1] > span[0] else "")
    if how == PATCH:
        other = st.text_input("The other prompt", key="other", bind="query-params", placeholder=prompt)
        if not other:
            st.caption("Type the prompt from which activations are taken.")
            return None
        there = live.run_prompt(checkpoint, other)
        usual = proposed_shift(run, there)
        help = "position p here takes p plus this of the other prompt; as proposed, both prompts end together"
        chosen = number(right, "Shift", -999, 999, None, key="shift", help=help, placeholder=str(usual))
        shift = usual if chosen is None else int(chosen)
        kind = {FEATURE: "feature", FEATURES: "features of head", HEAD: "z of head", LAYER: "z of layer"}[what]
        return Change(Patch(kind, which, **place, shift=shift), f"With {name} as in the other prompt", other)
    if how == RECONSTRUCT:
        kind = {HEAD: "head by reconstruction", LAYER: "layer by reconstruction"}[what]
        return Change(Intervention(kind, which, **place), f"With {name} replaced by its reconstruction")
    amount = 0.0
    if how != AWAY:
        label = "Times" if how == SCALE else "Activation"
        amount = float(number(right, label, -1000.0, 1000.0, 2.0, key="amount"))
    kind = {FEATURE: "clamp feature" if how == CLAMP else "scale feature", FEATURES: "scale features of head"}[what]
    words = {AWAY: f"Without {name}", SCALE: f"With {name} times {amount:g}", CLAMP: f"With {name} at {amount:g}"}[how]
    return Change(Intervention(kind, which, amount, **place), words)


def _draw_difference(
    checkpoint: Checkpoint,
    prompt: str,
    run: PromptRun,
    change: Change,
    effect: Effect,
    after: int,
    texts: tuple[str, str],
) -> None:
    """The logit difference of two tokens; of a patch, also with each head patched alone."""
    a, b = (live.single_token(checkpoint, text.replace("\u00b7", " ")) for text in texts)
    first, second = (visible(text) for text in texts)
    found = effect.logit_difference(a, b)
    st.text(
        f"logit({first}) - logit({second}): {found['clean']:+.3f} as it is, {found['full']:+.3f} (full), "
        f"{found['direct']:+.3f} (direct)"
    )
    if isinstance(change.change, Patch) and change.change.kind.endswith("of head"):
        scan = live.patch_scan(checkpoint, prompt, change.other, change.change, (a, b), after)
        st.caption(
            f"Each head patched alone: how much of the way to the other prompt ({scan['other'].iloc[0]:+.3f}) it goes."
        )
        st.altair_chart(charts.recovered(scan))


def _continue(checkpoint: Checkpoint, prompt: str, change: Change) -> None:
    """What the model writes next, as it is and changed."""
    if not st.toggle("Let the model write on", key="continue", bind="query-params"):
        return
    columns = st.columns(3)
    n = int(number(columns[0], "New tokens", 1, 200, 20, key="new"))
    temperature = float(number(columns[1], "Temperature", 0.0, 5.0, 0.0, key="temperature", help="0: the likeliest"))
    seed = int(number(columns[2], "Seed", 0, 2**31 - 1, 0, key="seed"))
    texts = live.continuation(checkpoint, prompt, change.change, n, temperature, seed)
    for text, words in zip(texts, ("As it is", change.words), strict=True):
        _draw_text(text, words)
    st.caption("Coloured: how much likelier (green) or less likely (vermillion) the change makes each token, in nats.")


def _draw_text(text: Continuation, words: str) -> None:
    likelier = (text.edited - text.clean).tolist()
    st.html(strips.strip(text.strings, likelier, words, strips.GREEN))
