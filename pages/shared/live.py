"""What is read or computed once for all sessions, which must not change it: SAEs, analyses, matches, prompts.

Functions that say so end the page with a sentence where they fail. The model holds its own lock around hooks; prompts
and ablations wait their turn before, so that a page can say for how many.
"""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pandas as pd
import streamlit as st

from analysis.heads.table import ModelHeads
from analysis.match.read import Match
from analysis.prompt import run as prompts
from analysis.prompt.continuation import Continuation, continue_prompt
from analysis.prompt.effect import Effect
from analysis.prompt.intervene import Intervention, intervene
from analysis.prompt.patch import Patch, patch, patch_every_head
from analysis.runs.model import head_table
from analysis.runs.sets import LayerSet
from analysis.store import Analysis
from analysis.tokens import visible
from pages.shared.page import hint, plain, sentences, typed
from pages.shared.turns import Turns
from trainer import embedded
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint, CheckpointError
from trainer.config import require

FORESEEN = (ValueError, RuntimeError, OSError)
_T = TypeVar("_T")


@st.cache_resource
def _places() -> dict[str, str]:
    """Where models lie that were moved, by fingerprint, as somebody said since the app was started."""
    return {}


def version(checkpoint: Checkpoint) -> tuple[Any, ...]:
    """What is cached of a checkpoint is read again once its weights, model, analysis or matches are others."""
    path = checkpoint.path
    files = [checkpoint.weights, path / "analysis" / "meta.json", *sorted(path.glob("matches/*/meta.json"))]
    place = _places().get(checkpoint.config.model.fingerprint)
    return str(path), place, *((str(file), os.path.getmtime(file)) for file in files if os.path.exists(file))


_PER_CHECKPOINT: dict[str, Any] = {"show_spinner": False, "hash_funcs": {Checkpoint: version}}


@st.cache_resource(max_entries=64, **_PER_CHECKPOINT)  # a circuit has one of each layer
def read_sae(checkpoint: Checkpoint) -> BlockDiagSAE:
    """The SAE of a checkpoint.

    Raises:
        CheckpointError: the weights cannot be used.
    """
    return checkpoint.sae


@st.cache_resource(max_entries=6, **_PER_CHECKPOINT)
def read_analysis(checkpoint: Checkpoint) -> Analysis:
    """The analysis of a checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    return Analysis(checkpoint)


def _version_of_set(of_set: LayerSet) -> tuple[Any, ...]:
    files = [(each, each.path / "eval.json") for each in of_set.members.values()]
    return tuple((version(each), os.path.getmtime(file) if os.path.exists(file) else None) for each, file in files)


def _version_of_heads(heads: ModelHeads) -> tuple[Any, ...]:
    return str(heads.folder), os.path.getmtime(heads.folder / "meta.json")


PER_MODEL: dict[str, Any] = {
    "show_spinner": False, "hash_funcs": {LayerSet: _version_of_set, ModelHeads: _version_of_heads},
}  # fmt: skip


@st.cache_resource(max_entries=4, **PER_MODEL)
def same_heads(heads: ModelHeads) -> ModelHeads:
    """The object of a folder that has been read already, as long as the folder is the same."""
    return heads


@st.cache_resource(max_entries=8, **PER_MODEL)
def model_table(heads: ModelHeads | None, of_set: LayerSet | None) -> tuple[pd.DataFrame, list[CheckpointError]]:
    """`model.head_table`, made once.

    Raises:
        CheckpointError: the table of the heads cannot be used.
    """
    return head_table(heads, of_set)


@st.cache_resource(max_entries=12, **_PER_CHECKPOINT)
def read_match(first: Checkpoint, second: Checkpoint) -> Match:
    """The match of two checkpoints.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    match = Match(first, second)
    _ = match.pairs, match.features
    return match


def analysis_or_hint(checkpoint: Checkpoint) -> Analysis | None:
    """The analysis of a checkpoint, or None with a sentence and the command that makes it."""
    try:
        return read_analysis(checkpoint)
    except CheckpointError as error:
        hint(error, "This command writes one; --tokens=20000 is quicker")
        return None


def tell_summary(checkpoint: Checkpoint, missing: str) -> None:
    """That there is only a summary, what a whole analysis has besides, and the command that makes one."""
    st.caption(f"This is the summary of an analysis. A whole one has {missing}, too:")
    st.code(f"python -m analysis {shlex.quote(typed(checkpoint.path))} --tokens=20000", language="bash")


def figures_or_hint(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """eval.json of a checkpoint, or None with a sentence."""
    if checkpoint.eval is None:
        st.info(f"{plain(checkpoint.name)} is still training: its held-out figures come with eval.json at the end.")
    return checkpoint.eval


@st.cache_resource(max_entries=2, show_spinner="Loading the language model")
def _language_model(name: str, dtype: str) -> tuple[Any, str]:
    """The model and its fingerprint, which is worth computing once."""
    # transformer_lens takes seconds to import: only pages with prompts pay
    from trainer.model.lm import LanguageModel, leave_cores

    leave_cores()
    lm = LanguageModel.load(name, dtype=dtype)
    return lm, lm.fingerprint()


def _opened(checkpoint: Checkpoint) -> tuple[Any, str]:
    """The model that a checkpoint was trained on and its fingerprint.

    Raises:
        ValueError: it cannot be loaded.
    """
    model = checkpoint.config.model
    place = _places().get(model.fingerprint) or checkpoint.place_of(model.name)
    return _language_model(place, model.dtype)


def _ask_for_model(checkpoint: Checkpoint) -> None:
    """A field for where a model lies that is not found, or is another one, where config.json says."""
    model = checkpoint.config.model
    place = st.text_input(
        "Where the language model lies now",
        key=f"place-{model.fingerprint}",
        help="A folder, or a name; kept until the app is started again. It must be the model trained on.",
    ).strip()
    if not place:
        return
    with sentences(FORESEEN):
        found = _language_model(place, model.dtype)[1]
        require(found == model.fingerprint, f"{place} has other weights than the model of {checkpoint.name}")
    _places()[model.fingerprint] = place
    st.rerun()


def _layer(checkpoint: Checkpoint) -> Any:
    """The attention layer of the language model that a checkpoint was trained on."""
    return _opened(checkpoint)[0].layer(checkpoint.layer)


@st.cache_resource
def _turns() -> Turns:
    return Turns()


@st.cache_resource(max_entries=6, **_PER_CHECKPOINT)
def _of_run(checkpoint: Checkpoint, prompt: str, fuzzy_from: float) -> list[prompts.PromptRun]:
    return []


@st.cache_resource(max_entries=32, **_PER_CHECKPOINT)
def _of_effect(
    checkpoint: Checkpoint, prompt: str, other: str, change: Intervention | Patch, position: int
) -> list[Effect]:
    return []


@st.cache_resource(max_entries=32, **_PER_CHECKPOINT)
def _of_scan(
    checkpoint: Checkpoint, prompt: str, other: str, change: Patch, tokens: tuple[int, int], position: int
) -> list[pd.DataFrame]:
    return []


@st.cache_resource(max_entries=32, **_PER_CHECKPOINT)
def _of_continuation(
    checkpoint: Checkpoint, prompt: str, change: Intervention, n: int, temperature: float, seed: int
) -> list[tuple[Continuation, Continuation]]:
    return []


def in_turn(kept: list[_T], what: str, compute: Callable[[], _T]) -> _T:
    """What is kept, or else computed once it is this session's turn, with `what` as its spinner.

    Not in a function that is cached: a cache would replay what is drawn while one waits.
    """

    def wait(before: int) -> None:
        are = "prompt is" if before == 1 else "prompts are"
        place.text(f"Waiting for the language model: {before} {are} before this one.")

    place = st.empty()  # also where nothing is to be said: else all that follows moves by one
    if not kept:
        with _turns().take(wait), place, st.spinner(what):
            if not kept:  # another session asked for the same, and was before
                kept.append(compute())
    place.empty()
    return kept[0]


def _fuzzy_from(checkpoint: Checkpoint) -> float:
    """From where its analysis calls tokens similar; without one no cosine is as large."""
    try:
        return read_analysis(checkpoint).meta["fuzzy_from"]
    except CheckpointError:
        return 2.0


def _run(checkpoint: Checkpoint, prompt: str, slots_of: Checkpoint | None = None) -> prompts.PromptRun:
    fuzzy_from = _fuzzy_from(slots_of or checkpoint)
    return in_turn(
        _of_run(checkpoint, prompt, fuzzy_from),
        "Running the prompt",
        lambda: prompts.run_prompt(_layer(checkpoint), read_sae(checkpoint), prompt, fuzzy_from),
    )


@sentences(FORESEEN)
def language_model(checkpoint: Checkpoint) -> Any:
    """The model that a checkpoint was trained on, the embedded one fetched first if it is not there.

    Errors end the page with a sentence. Where the model is not found, a field asks where it lies now.
    """
    model = checkpoint.config.model
    if model.name == embedded.NAME and not embedded.is_ready():
        with st.empty():
            bar = st.progress(0.0, "The embedded model is fetched once")
            embedded.ensure(lambda fraction, message: bar.progress(fraction, message))
            st.empty()
    try:
        lm, fingerprint = _opened(checkpoint)
    except FORESEEN:
        _ask_for_model(checkpoint)
        raise
    if fingerprint != model.fingerprint:
        st.warning(f"{plain(model.name)} has other weights here than when {plain(checkpoint.name)} was trained.")
        _ask_for_model(checkpoint)
    return lm


@sentences(FORESEEN)
def run_prompt(checkpoint: Checkpoint, prompt: str, slots_of: Checkpoint | None = None) -> prompts.PromptRun:
    """Run a prompt; errors end the page with a sentence.

    Args:
        slots_of: another one of the same model, whose analysis says which tokens are similar; default its own.
    """
    language_model(checkpoint)
    return _run(checkpoint, prompt, slots_of)


@sentences(FORESEEN)
def effect(checkpoint: Checkpoint, prompt: str, change: Intervention | Patch, position: int, other: str = "") -> Effect:
    """What a change does to the prediction of the token after `position`; errors are a sentence.

    Args:
        other: the prompt that a patch is taken from.
    """
    run = _run(checkpoint, prompt)
    there = _run(checkpoint, other) if isinstance(change, Patch) else None

    def compute() -> Effect:
        layer, sae = _layer(checkpoint), read_sae(checkpoint)
        if isinstance(change, Patch):
            return patch(layer, sae, run, there, change, position)
        return intervene(layer, sae, run, change, position)

    return in_turn(_of_effect(checkpoint, prompt, other, change, position), "Intervening", compute)


def next_tokens(checkpoint: Checkpoint, effect: Effect) -> pd.DataFrame:
    """The likeliest and the most changed next tokens, with and without a change: `Effect.table`, with their texts."""
    table = effect.table(effect.most_changed())
    texts = _layer(checkpoint).lm.token_strings(table["id"].tolist())
    table.insert(0, "token", [visible(text) for text in texts])
    return table


@sentences(FORESEEN)
def single_token(checkpoint: Checkpoint, text: str) -> int:
    """The id of a text that is one token; a sentence where it is not."""
    return _layer(checkpoint).lm.single_token(text)


@sentences(FORESEEN)
def patch_scan(
    checkpoint: Checkpoint, prompt: str, other: str, change: Patch, tokens: tuple[int, int], position: int
) -> pd.DataFrame:
    """A patch of each head alone, by a logit difference (`patch_every_head`); errors are a sentence."""
    run, there = _run(checkpoint, prompt), _run(checkpoint, other)
    return in_turn(
        _of_scan(checkpoint, prompt, other, change, tokens, position),
        "Patching head by head",
        lambda: patch_every_head(_layer(checkpoint), read_sae(checkpoint), run, there, change, tokens, position),
    )


@sentences(FORESEEN)
def continuation(
    checkpoint: Checkpoint, prompt: str, change: Intervention, n: int, temperature: float, seed: int
) -> tuple[Continuation, Continuation]:
    """The prompt continued without and with a change (`continue_prompt`); errors are a sentence."""
    run = _run(checkpoint, prompt)
    return in_turn(
        _of_continuation(checkpoint, prompt, change, n, temperature, seed),
        "Writing on",
        lambda: continue_prompt(_layer(checkpoint), read_sae(checkpoint), run, change, n, temperature, seed),
    )


def direct_effects(checkpoint: Checkpoint, prompt: str, token: int) -> Any:
    """What each firing adds to the logit of a token, `[pos, block, feature]`."""
    return prompts.direct_effects(_layer(checkpoint), read_sae(checkpoint), _run(checkpoint, prompt), token)


@sentences(FORESEEN)
@st.cache_data(max_entries=4, **_PER_CHECKPOINT | {"show_spinner": "Running the model and drawing with sae-vis"})
def sae_vis_page(checkpoint: Checkpoint, features: tuple[int, ...]) -> bytes:
    """The sae-vis HTML of some features; errors end the page with a sentence."""
    from analysis.sae_vis import export  # imports sae_lens, for seconds

    with TemporaryDirectory() as folder:
        out = Path(folder) / "page.html"
        export(checkpoint.path, out, tokens=4_000, features=list(features), lm=_layer(checkpoint).lm)
        return out.read_bytes()
