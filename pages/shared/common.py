"""What every page needs of Streamlit: its top, the checkpoint folder, and what is read from it.

Everything a widget chooses is in the URL (`bind="query-params"`), so an address is a permalink. SAEs and analyses
are read once for all sessions, which must not change them.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.errors import StreamlitAPIException
from streamlit.runtime.pages_manager import PagesManager

from analysis.store import Analysis
from trainer.checkpoint import Checkpoint, CheckpointError, list_checkpoints

ROOT = Path(__file__).parents[2]
FIRST_COMMAND = (
    "python -m trainer --distinct_tokens=130000 --total_training_steps=300 --batch_size=2048 --eval_tokens=1024"
)
_copy_link = st.components.v2.component(
    "copy_link",
    html="<div><button type='button'>Copy link</button></div>",
    css="""div { text-align: right; }
    button { font: inherit; font-size: .85rem; padding: .25rem .6rem; border-radius: .5rem; cursor: pointer;
    color: var(--st-text-color); background: var(--st-background-color); border: 1px solid var(--st-border-color); }
    button:focus-visible { outline: 2px solid var(--st-primary-color); }""",
    js="""export default function ({ parentElement }) {
    const button = parentElement.querySelector("button");
    button.onclick = async () => {
        try { await navigator.clipboard.writeText(window.location.href); button.textContent = "Copied"; }
        catch { button.textContent = "Copy it from the address bar"; }  // without https there is no clipboard
        setTimeout(() => { button.textContent = "Copy link"; }, 2000);
    };
}""",
)


def begin(title: str, what: str) -> None:
    """The top of a page: its title and one sentence on what it shows.

    Where the first address that a fresh server sees is a page's own, Streamlit finds `pages/` by
    itself and runs the script without app.py; so it is sent through app.py first.
    """
    if PagesManager.uses_pages_directory:
        PagesManager.uses_pages_directory = False
        st.rerun()
    left, right = st.columns([6, 1], vertical_alignment="bottom")
    left.title(title)
    with right:
        _copy_link(key="copy_link")
    st.caption(what)


def folder() -> Path:
    """The checkpoint folder: `checkpoints/` beside app.py, or ATTN_SAES_CHECKPOINTS."""
    return Path(os.environ.get("ATTN_SAES_CHECKPOINTS") or ROOT / "checkpoints")


def readable() -> list[Checkpoint]:
    """Checkpoints that can be shown; the others are listed with their reason, and the app goes on."""
    found, errors = list_checkpoints(folder())
    if errors:
        with st.expander(f"{len(errors)} unreadable checkpoint(s) in {folder().name}/", icon=":material/warning:"):
            for error in errors:
                st.text(str(error))
    if not found:
        st.info("There is no checkpoint to show yet. Train one, it appears here while it trains:")
        st.code(FIRST_COMMAND, language="bash")
        st.stop()
    return found


def select(column: Any, label: str, options: Sequence[str], key: str, **more: Any) -> str:
    """A select box kept in the URL; a choice that is no option any more gives way to the first, also in the URL."""
    if st.session_state.get(key, options[0]) not in options:
        st.session_state[key] = options[0]
    return column.selectbox(label, options, key=key, bind="query-params", **more)


def pick_checkpoint(listed: list[Checkpoint], label: str, key: str, index: int = 0) -> Checkpoint:
    """A select box over checkpoint names, kept in the URL under `key`; `index` counts from the default one.

    Streamlit leaves defaults out of the URL. Which checkpoint is the default changes as others are trained, so the box
    has none: the name is written down, and a link means the same SAE tomorrow.
    """
    by_name = {each.name: each for each in listed}
    names = list(by_name)
    default = names[(names.index(_default(listed).name) + index) % len(names)]
    wanted = st.query_params.get(key)
    if wanted is not None and wanted not in by_name:
        st.warning(f"There is no checkpoint {wanted} in {folder().name}/: {default} is shown.")
    name = st.session_state.get(key, wanted)
    if name not in by_name:
        name = st.session_state[key] = default
    if wanted is None:
        with suppress(StreamlitAPIException):  # refused where the box is already bound to it
            st.query_params[key] = name
    return by_name[st.selectbox(label, names, None, key=key, bind="query-params") or default]


def _default(listed: list[Checkpoint]) -> Checkpoint:
    """The plain block-diagonal checkpoint with L0 up to 40 (which one can read) that keeps most; else the sparsest.

    Plain: neither a baseline nor labelled as a variant.
    """

    def rank(each: Checkpoint) -> tuple[bool, bool, float]:
        figures = each.eval or {"L0": math.inf, "FVU": math.inf}
        options = each.config.options
        variant = each.is_dense or options is None or options.sae.label is not None
        readable = figures["L0"] <= 40
        return variant, not readable, figures["FVU"] if readable else figures["L0"]

    return min(listed, key=rank)


def evaluation(listed: Checkpoint) -> dict[str, Any] | None:
    """eval.json of a checkpoint, or None with a sentence on the page."""
    figures = listed.eval
    if figures is None:
        st.info(f"{listed.name} is still training: its held-out figures come with eval.json at the end.")
    return figures


def pick_text(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose between the two texts of eval.json; returns the figures on the chosen one."""
    texts = {"Held-out text": lambda f: f, "Repeated random tokens": lambda f: f["induction"]}
    choice = st.segmented_control(
        "Evaluated on", list(texts), default="Held-out text", required=True, key="text", bind="query-params"
    )
    return [texts[choice](each) for each in figures]


def version(checkpoint: Checkpoint) -> tuple[str, float, float]:
    """What is cached of a checkpoint is read again once its weights or its analysis are others."""
    return str(checkpoint.path), modified(checkpoint.weights), modified(checkpoint.path / "analysis" / "meta.json")


@st.cache_resource(max_entries=8, show_spinner=False, hash_funcs={Checkpoint: version})
def opened(checkpoint: Checkpoint) -> Checkpoint:
    """One object for all sessions, so that weights are read once.

    Raises:
        CheckpointError: the weights cannot be used.
    """
    _ = checkpoint.sae
    return checkpoint


@st.cache_resource(max_entries=6, show_spinner=False, hash_funcs={Checkpoint: version})
def load_analysis(checkpoint: Checkpoint) -> Analysis:
    """The analysis of a checkpoint, read once for all sessions, which must not change its frames.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    return Analysis(checkpoint)


def analysis_or_hint(listed: Checkpoint) -> Analysis | None:
    """The analysis of a checkpoint, or None with a sentence and the command that makes it."""
    try:
        return load_analysis(listed)
    except CheckpointError as error:
        st.info(f"{error.reason}. This command writes one; --tokens=20000 is quicker:")
        st.code(f"python -m analysis {shown_path(listed.path)}", language="bash")
        return None


def feature_link(column: Any, listed: Checkpoint, feature: int) -> None:
    """A link to a feature's dashboard, where there is an analysis."""
    if (listed.path / "analysis" / "meta.json").exists():
        query = {"checkpoint": listed.name, "feature": str(feature)}
        column.page_link(
            "pages/features.py", label="Its dashboard", icon=":material/arrow_forward:", query_params=query
        )


@contextmanager
def sentences() -> Iterator[None]:
    """A file that turns out to be damaged ends the page with its sentence, not with a traceback."""
    try:
        yield
    except CheckpointError as error:
        st.error(str(error))
        st.stop()


def shown_path(path: Path) -> str:
    """A path as one types it beside app.py."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def modified(file: Path) -> float:
    """When a file was changed, 0 where there is none: the key of what is cached of it."""
    return file.stat().st_mtime if file.exists() else 0.0
