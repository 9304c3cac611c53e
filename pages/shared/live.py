"""What is read or computed once for all sessions, which must not change it: SAEs, analyses, matches, prompts.

Functions that say so end the page with a sentence where they fail. The model holds its own lock around hooks.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import streamlit as st

from analysis.match.read import Match
from analysis.prompt import ablate
from analysis.prompt import run as prompts
from analysis.store import Analysis
from analysis.tokens import visible
from pages.shared.page import hint, plain, sentences
from trainer import embedded
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint, CheckpointError

_FORESEEN = (ValueError, RuntimeError, OSError)


def version(checkpoint: Checkpoint) -> tuple[Any, ...]:
    """What is cached of a checkpoint is read again once its weights, its analysis or its matches are others."""
    path = checkpoint.path
    files = [checkpoint.weights, path / "analysis" / "meta.json", *sorted(path.glob("matches/*/meta.json"))]
    return str(path), *((str(file), os.path.getmtime(file)) for file in files if os.path.exists(file))


_PER_CHECKPOINT: dict[str, Any] = {"show_spinner": False, "hash_funcs": {Checkpoint: version}}


@st.cache_resource(max_entries=8, **_PER_CHECKPOINT)
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


def figures_or_hint(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """eval.json of a checkpoint, or None with a sentence."""
    if checkpoint.eval is None:
        st.info(f"{plain(checkpoint.name)} is still training: its held-out figures come with eval.json at the end.")
    return checkpoint.eval


@st.cache_resource(max_entries=2, show_spinner="Loading the language model")
def _language_model(name: str, dtype: str) -> tuple[Any, str]:
    """The model and its fingerprint, which is worth computing once."""
    from trainer.model.lm import LanguageModel  # transformer_lens takes seconds to import: only pages with prompts pay

    lm = LanguageModel.load(name, dtype=dtype)
    return lm, lm.fingerprint()


def _layer(checkpoint: Checkpoint) -> Any:
    """The attention layer of the language model that a checkpoint was trained on."""
    model = checkpoint.config.model
    return _language_model(model.name, model.dtype)[0].layer(model.hook_layer)


@st.cache_resource(max_entries=6, **_PER_CHECKPOINT | {"show_spinner": "Running the prompt"})
def _run(checkpoint: Checkpoint, prompt: str) -> prompts.PromptRun:
    return prompts.run_prompt(_layer(checkpoint), read_sae(checkpoint), prompt)


@sentences(_FORESEEN)
def run_prompt(checkpoint: Checkpoint, prompt: str) -> prompts.PromptRun:
    """Run a prompt, fetching the embedded model first if it is not there; errors end the page with a sentence."""
    model = checkpoint.config.model
    if model.name == embedded.NAME and not embedded.is_ready():  # not in `_run`: a cache would replay the bar
        with st.empty():
            bar = st.progress(0.0, "The embedded model is fetched once")
            embedded.ensure(lambda fraction, message: bar.progress(fraction, message))
            st.empty()
    run = _run(checkpoint, prompt)
    if _language_model(model.name, model.dtype)[1] != model.fingerprint:
        st.warning(f"{plain(model.name)} has other weights here than when {plain(checkpoint.name)} was trained.")
    return run


@sentences(_FORESEEN)
@st.cache_data(max_entries=64, **_PER_CHECKPOINT | {"show_spinner": "Ablating"})
def ablation(checkpoint: Checkpoint, prompt: str, kind: ablate.Kind, which: int, position: int) -> pd.DataFrame:
    """The likeliest and the most changed next tokens after `position`, with and without; errors are a sentence."""
    layer = _layer(checkpoint)
    change = ablate.ablate(layer, read_sae(checkpoint), _run(checkpoint, prompt), kind, which, position)
    table = change.table(change.most_changed())
    table.insert(0, "token", [visible(text) for text in layer.lm.token_strings(table["id"].tolist())])
    return table


def direct_effects(checkpoint: Checkpoint, prompt: str, token: int) -> Any:
    """What each firing adds to the logit of a token, `[pos, block, feature]`."""
    return prompts.direct_effects(_layer(checkpoint), read_sae(checkpoint), _run(checkpoint, prompt), token)


@sentences(_FORESEEN)
@st.cache_data(max_entries=4, **_PER_CHECKPOINT | {"show_spinner": "Running the model and drawing with sae-vis"})
def sae_vis_page(checkpoint: Checkpoint, features: tuple[int, ...]) -> bytes:
    """The sae-vis HTML of some features; errors end the page with a sentence."""
    from analysis.sae_vis import export  # imports sae_lens, for seconds

    with TemporaryDirectory() as folder:
        out = Path(folder) / "page.html"
        export(checkpoint.path, out, tokens=4_000, features=list(features), lm=_layer(checkpoint).lm)
        return out.read_bytes()
