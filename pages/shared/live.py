"""Prompts through the language model, for the pages that run one.

The model is shared by all sessions and holds its own lock around hooks.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import streamlit as st

from analysis.prompt.ablate import Kind, ablate
from analysis.prompt.run import PromptRun, direct_effects, role_table, run_prompt, visible
from pages.shared import common
from trainer import checkpoint, embedded
from trainer.block_diag import BlockDiagSAE

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


def _loaded(path: str) -> tuple[Any, BlockDiagSAE, int]:
    """The language model, the SAE and the layer of a checkpoint."""
    sae, config = common.load_sae(Path(path))
    model = config["model"]
    return _language_model(model["name"], model["dtype"])[0], sae, model["hook_layer"]


@st.cache_resource(max_entries=6, show_spinner="Running the prompt")
def _prompt_run(path: str, modified: float, prompt: str) -> PromptRun:
    lm, sae, layer = _loaded(path)
    return run_prompt(lm, sae, layer, prompt)


def prompt_run(listed: checkpoint.Listed, prompt: str) -> PromptRun:
    """Run a prompt, fetching the embedded model first if it is not there; errors end the page with a sentence."""
    model = listed.config["model"]
    name = model["name"]
    try:
        if name == embedded.NAME and not embedded.is_ready():
            with st.empty():
                bar = st.progress(0.0, "The embedded model is fetched once")
                embedded.ensure(lambda fraction, message: bar.progress(fraction, message))
                st.empty()
        run = _prompt_run(str(listed.path), _weights(listed), prompt)
        _, fingerprint = _language_model(name, model["dtype"])
        if fingerprint != model["fingerprint"]:
            st.warning(f"{name} has other weights here than when {listed.path.name} was trained.")
        return run
    except (ValueError, RuntimeError, OSError) as error:
        st.error(str(error))
        st.stop()


@st.cache_data(max_entries=64, show_spinner="Ablating")
def _ablation(path: str, modified: float, prompt: str, kind: Kind, which: int, position: int) -> pd.DataFrame:
    lm, sae, layer = _loaded(path)
    found = ablate(lm, sae, layer, _prompt_run(path, modified, prompt), kind, which, position)
    table = found.table(found.most_changed())
    table.insert(0, "token", [visible(text) for text in lm.token_strings(table["id"].tolist())])
    return table


def ablation(listed: checkpoint.Listed, prompt: str, kind: Kind, which: int, position: int) -> pd.DataFrame:
    """The likeliest and the most changed next tokens after `position`, with and without; errors are a sentence."""
    try:
        return _ablation(str(listed.path), _weights(listed), prompt, kind, which, position)
    except (ValueError, RuntimeError) as error:
        st.error(str(error))
        st.stop()


def predictions(listed: checkpoint.Listed, prompt: str, position: int) -> pd.DataFrame:
    """The likeliest next tokens after `position`, as they are and with the SAE spliced in."""
    return ablation(listed, prompt, "layer by reconstruction", 0, position)


def direct_effects_on(listed: checkpoint.Listed, prompt: str, token: int) -> Any:
    """What each firing adds to the logit of a token, `[pos, block, feature]`."""
    path = str(listed.path)
    return direct_effects(*_loaded(path), _prompt_run(path, _weights(listed), prompt), token)


@st.cache_data(max_entries=4, show_spinner="Running the model and drawing with sae-vis")
def _sae_vis_page(path: str, modified: float, features: tuple[int, ...]) -> bytes:
    from analysis.sae_vis import export  # imports sae_lens, for seconds

    lm, _, _ = _loaded(path)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "page.html"
        export(Path(path), out, tokens=4_000, features=list(features), lm=lm)
        return out.read_bytes()


def sae_vis_page(listed: checkpoint.Listed, features: tuple[int, ...]) -> bytes:
    """The sae-vis HTML of some features; errors end the page with a sentence."""
    try:
        return _sae_vis_page(str(listed.path), _weights(listed), features)
    except (ValueError, RuntimeError, OSError) as error:
        st.error(str(error))
        st.stop()


def _weights(listed: checkpoint.Listed) -> float:
    return common.modified(listed.path / "sae.safetensors")


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
