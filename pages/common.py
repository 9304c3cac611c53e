"""What every page needs of Streamlit: caches, and the widgets that pages share.

Models and SAEs are shared by all sessions; the model holds its own lock around hooks. Everything a
widget chooses is in the URL (`bind="query-params"`), so an address is a permalink.
"""

import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from streamlit.runtime.pages_manager import PagesManager

from analysis.prompt import PromptRun, role_table, run_prompt
from trainer import checkpoint, embedded
from trainer.block_diag import BlockDiagSAE

ROOT = Path(__file__).parents[1]
FIRST_COMMAND = (
    "python -m trainer --distinct_tokens=130000 --total_training_steps=300 --batch_size=2048 --eval_tokens=1024"
)
EXAMPLES = {
    "Repetition": "The cat sat on the mat. The dog ran to the park. The cat sat on the",
    "Names": "When John and Mary went to the store, John gave a drink to",
    "Speech": "Fellow citizens of the Senate and of the House of Representatives: I congratulate you on the "
    "favorable state of our public affairs. The Senate and the House of",
    "Code": "def add(first, second):\n    return first + second\n\ndef subtract(first, second):\n    return",
}


def begin(title: str, what: str) -> None:
    """The top of a page: its title and one sentence on what it shows.

    Where the first address that a fresh server sees is a page's own, Streamlit finds `pages/` by
    itself and runs the script without app.py; so it is sent through app.py first.
    """
    if PagesManager.uses_pages_directory:
        PagesManager.uses_pages_directory = False
        st.rerun()
    st.title(title)
    st.caption(what)


def folder() -> Path:
    """The checkpoint folder: `checkpoints/` beside app.py, or ATTN_SAES_CHECKPOINTS."""
    return Path(os.environ.get("ATTN_SAES_CHECKPOINTS") or ROOT / "checkpoints")


def readable() -> list[checkpoint.Listed]:
    """Checkpoints that can be shown; the others are listed with their reason, and the app goes on."""
    listed = checkpoint.list_checkpoints(folder())
    broken = [each for each in listed if each.error]
    if broken:
        with st.expander(f"{len(broken)} unreadable checkpoint(s) in {folder().name}/", icon=":material/warning:"):
            for each in broken:
                st.text(each.error)
    found = [each for each in listed if each.config]
    if not found:
        st.info("There is no checkpoint to show yet. Train one, it appears here while it trains:")
        st.code(FIRST_COMMAND, language="bash")
        st.stop()
    return found


def pick_checkpoint(listed: list[checkpoint.Listed], label: str, key: str, index: int = 0) -> checkpoint.Listed:
    """A select box over checkpoint names, kept in the URL under `key`; `index` counts from the default one."""
    by_name = {each.path.name: each for each in listed}
    names = list(by_name)
    first = (names.index(_default(listed).path.name) + index) % len(names)
    return by_name[st.selectbox(label, names, index=first, key=key, bind="query-params")]


def _default(listed: list[checkpoint.Listed]) -> checkpoint.Listed:
    """The plain block-diagonal checkpoint with L0 up to 40 (which one can read) that keeps most; else the sparsest.

    Plain: neither a baseline nor labelled as a variant.
    """

    def rank(each: checkpoint.Listed) -> tuple[bool, bool, float]:
        figures = checkpoint.load_eval(each.path) or {"L0": math.inf, "FVU": math.inf}
        variant = each.config["block"] == "dense" or each.config["training"].get("label") is not None
        readable = figures["L0"] <= 40
        return variant, not readable, figures["FVU"] if readable else figures["L0"]

    return min(listed, key=rank)


def evaluation(listed: checkpoint.Listed) -> dict[str, Any] | None:
    """eval.json of a checkpoint, or None with a sentence on the page."""
    figures = checkpoint.load_eval(listed.path)
    if figures is None:
        st.info(f"{listed.path.name} is still training: its held-out figures come with eval.json at the end.")
    return figures


def pick_text(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose between the two texts of eval.json; returns the figures on the chosen one."""
    texts = {"Held-out text": lambda f: f, "Repeated random tokens": lambda f: f["induction"]}
    choice = st.segmented_control(
        "Evaluated on", list(texts), default="Held-out text", required=True, key="text", bind="query-params"
    )
    return [texts[choice](each) for each in figures]


@st.cache_resource(max_entries=8, show_spinner=False)
def _sae(path: str, modified: float) -> tuple[BlockDiagSAE, dict[str, Any]]:
    return checkpoint.load(path)


@st.cache_resource(max_entries=2, show_spinner="Loading the language model")
def _language_model(name: str, dtype: str) -> tuple[Any, str]:
    """The model and its fingerprint, which is worth computing once."""
    from trainer.lm import LanguageModel  # transformer_lens takes seconds to import: only pages with prompts pay

    lm = LanguageModel.load(name, dtype=dtype)
    return lm, lm.fingerprint()


@st.cache_resource(max_entries=6, show_spinner="Running the prompt")
def _prompt_run(path: str, modified: float, prompt: str) -> PromptRun:
    sae, config = _sae(path, modified)
    model = config["model"]
    lm, _ = _language_model(model["name"], model["dtype"])
    return run_prompt(lm, sae, model["hook_layer"], prompt)


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
        run = _prompt_run(str(listed.path), _modified(listed.path), prompt)
        _, fingerprint = _language_model(name, model["dtype"])
        if fingerprint != model["fingerprint"]:
            st.warning(f"{name} has other weights here than when {listed.path.name} was trained.")
        return run
    except (ValueError, RuntimeError, OSError) as error:
        st.error(str(error))
        st.stop()


def prompt_box() -> str:
    """The prompt and its examples; the prompt is in the URL."""
    st.session_state.setdefault("prompt", EXAMPLES["Repetition"])
    prompt = st.text_area("Prompt", key="prompt", bind="query-params", height=90)
    with st.container(horizontal=True):
        for name, text in EXAMPLES.items():
            st.button(name, key=f"example_{name}", on_click=_set_prompt, args=(text,), help=text)
    return prompt


def show_role_table(shares: pd.DataFrame) -> None:
    """The largest slot of each head by attention and by DFA."""
    st.dataframe(
        role_table(shares),
        hide_index=True,
        width="content",
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


def _modified(path: Path) -> float:
    file = path / "sae.safetensors"
    return file.stat().st_mtime if file.exists() else 0.0
