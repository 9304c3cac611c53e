"""Prompts through the language model, for the pages that run one.

The model is shared by all sessions and holds its own lock around hooks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import streamlit as st

from analysis.prompt.ablate import Kind, ablate
from analysis.prompt.run import PromptRun, direct_effects, role_table, run_prompt
from analysis.tokens import visible
from pages.shared import common
from trainer import embedded
from trainer.checkpoint import Checkpoint

# A tour on the shipped checkpoint batchtopk-x8-k32: what one should see is tested in tests/test_embedded.py.
EXAMPLES = {
    "Induction": (
        "The cat sat on the mat. The dog ran to the park. The cat sat on the",
        "At the last token the features of heads 3, 4 and 5 read ' mat', which followed the earlier ' the': the "
        "induction slot. Take away all features of head 4 and ' mat' falls from 47 % to 33 %, while the direct effect "
        "hardly moves: later layers carry it.",
    ),
    "Indirect object": (
        "When John and Mary went to the store, John gave a drink to",
        "At ' to' the strongest features are head 8's, and they read the previous token, ' drink'. The name is settled "
        "elsewhere: with all of the layer replaced by its reconstruction ' Mary' keeps 89 of 90 %, and of single heads "
        "only head 4 matters (85 % without its features).",
    ),
    "Previous token": (
        "Fellow citizens of the Senate and of the House of Representatives: I congratulate you on the favorable state "
        "of our public affairs. The Senate and the House of",
        "Pick head 8 and the last token: its features read ' House', one token back. It is the one head whose role is "
        "the previous token by DFA, while by attention every head rests on BOS.",
    ),
    "Duplicate token": (
        "Paris, London, Paris, Rome, London, Rome, Berlin, Paris, Berlin, London",
        "No head of this layer is a duplicate-token head: the largest shares of DFA on earlier copies are head 7's and "
        "head 0's, a fifth to a quarter. Heads 3, 4 and 5 read instead what followed the earlier copies, the commas.",
    ),
}


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


@st.cache_resource(max_entries=6, show_spinner="Running the prompt", hash_funcs={Checkpoint: common.version})
def _prompt_run(checkpoint: Checkpoint, prompt: str) -> PromptRun:
    return run_prompt(_layer(checkpoint), common.opened(checkpoint).sae, prompt)


def prompt_run(checkpoint: Checkpoint, prompt: str) -> PromptRun:
    """Run a prompt, fetching the embedded model first if it is not there; errors end the page with a sentence."""
    model = checkpoint.config.model
    with _sentences():
        if model.name == embedded.NAME and not embedded.is_ready():
            with st.empty():
                bar = st.progress(0.0, "The embedded model is fetched once")
                embedded.ensure(lambda fraction, message: bar.progress(fraction, message))
                st.empty()
        run = _prompt_run(checkpoint, prompt)
        if _language_model(model.name, model.dtype)[1] != model.fingerprint:
            st.warning(f"{model.name} has other weights here than when {checkpoint.name} was trained.")
        return run


@st.cache_data(max_entries=64, show_spinner="Ablating", hash_funcs={Checkpoint: common.version})
def _ablation(checkpoint: Checkpoint, prompt: str, kind: Kind, which: int, position: int) -> pd.DataFrame:
    layer, sae = _layer(checkpoint), common.opened(checkpoint).sae
    found = ablate(layer, sae, _prompt_run(checkpoint, prompt), kind, which, position)
    table = found.table(found.most_changed())
    table.insert(0, "token", [visible(text) for text in layer.lm.token_strings(table["id"].tolist())])
    return table


def ablation(checkpoint: Checkpoint, prompt: str, kind: Kind, which: int, position: int) -> pd.DataFrame:
    """The likeliest and the most changed next tokens after `position`, with and without; errors are a sentence."""
    with _sentences():
        return _ablation(checkpoint, prompt, kind, which, position)


def predictions(checkpoint: Checkpoint, prompt: str, position: int) -> pd.DataFrame:
    """The likeliest next tokens after `position`, as they are and with the SAE spliced in."""
    return ablation(checkpoint, prompt, "layer by reconstruction", 0, position)


def direct_effects_on(checkpoint: Checkpoint, prompt: str, token: int) -> Any:
    """What each firing adds to the logit of a token, `[pos, block, feature]`."""
    return direct_effects(_layer(checkpoint), common.opened(checkpoint).sae, _prompt_run(checkpoint, prompt), token)


@st.cache_data(
    max_entries=4, show_spinner="Running the model and drawing with sae-vis", hash_funcs={Checkpoint: common.version}
)
def _sae_vis_page(checkpoint: Checkpoint, features: tuple[int, ...]) -> bytes:
    from analysis.sae_vis import export  # imports sae_lens, for seconds

    with TemporaryDirectory() as folder:
        out = Path(folder) / "page.html"
        export(checkpoint.path, out, tokens=4_000, features=list(features), lm=_layer(checkpoint).lm)
        return out.read_bytes()


def sae_vis_page(checkpoint: Checkpoint, features: tuple[int, ...]) -> bytes:
    """The sae-vis HTML of some features; errors end the page with a sentence."""
    with _sentences():
        return _sae_vis_page(checkpoint, features)


@contextmanager
def _sentences() -> Iterator[None]:
    """What cannot be run ends the page with its sentence."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        st.error(str(error))
        st.stop()


def prompt_box() -> str:
    """The prompt and a tour of four examples, each with what to see; the prompt is in the URL."""
    prompt = st.text_area("Prompt", EXAMPLES["Induction"][0], key="prompt", bind="query-params", height=90)
    with st.container(horizontal=True):
        for name, (text, _) in EXAMPLES.items():
            st.button(name, key=f"example_{name}", on_click=_set_prompt, args=(text,), help=text)
    for text, what in EXAMPLES.values():
        if prompt == text:
            st.caption(f"On the shipped checkpoint batchtopk-x8-k32: {what}")
    return prompt


def show_role_table(shares: pd.DataFrame) -> None:
    """The largest slot of each head by attention and by DFA."""
    st.dataframe(
        role_table(shares),
        hide_index=True,
        column_config={
            "head": st.column_config.NumberColumn(width=50),
            "by attention": st.column_config.TextColumn(width=90),
            "attention share": st.column_config.NumberColumn("share", format="percent", width=70),
            "by DFA": st.column_config.TextColumn(width=90),
            "DFA share": st.column_config.NumberColumn("share of DFA", format="percent", width=90),
            "agree": st.column_config.CheckboxColumn(width=60),
        },
    )


def _set_prompt(text: str) -> None:
    st.session_state["prompt"] = text
