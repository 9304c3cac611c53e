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
from trainer import checkpoint
from trainer.block_diag import BlockDiagSAE

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


def select(column: Any, label: str, options: Sequence[str], key: str, **more: Any) -> str:
    """A select box kept in the URL; a choice that is no option any more gives way to the first, also in the URL."""
    if st.session_state.get(key, options[0]) not in options:
        st.session_state[key] = options[0]
    return column.selectbox(label, options, key=key, bind="query-params", **more)


def pick_checkpoint(listed: list[checkpoint.Listed], label: str, key: str, index: int = 0) -> checkpoint.Listed:
    """A select box over checkpoint names, kept in the URL under `key`; `index` counts from the default one.

    Streamlit leaves defaults out of the URL. Which checkpoint is the default changes as others are trained, so the box
    has none: the name is written down, and a link means the same SAE tomorrow.
    """
    by_name = {each.path.name: each for each in listed}
    names = list(by_name)
    default = names[(names.index(_default(listed).path.name) + index) % len(names)]
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


def load_sae(path: Path) -> tuple[BlockDiagSAE, dict[str, Any]]:
    """An SAE and its config, read once for all sessions.

    Raises:
        CheckpointError: it cannot be used.
    """
    return _sae(str(path), modified(path / "sae.safetensors"))


@st.cache_resource(max_entries=6, show_spinner=False)
def _analysis(path: str, changed: tuple[float, float]) -> Analysis:
    return Analysis(path)


def load_analysis(path: Path) -> Analysis:
    """The analysis of a checkpoint, read once for all sessions, which must not change its frames.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    return _analysis(str(path), (modified(path / "analysis" / "meta.json"), modified(path / "sae.safetensors")))


def analysis_or_hint(listed: checkpoint.Listed) -> Analysis | None:
    """The analysis of a checkpoint, or None with a sentence and the command that makes it."""
    try:
        return load_analysis(listed.path)
    except checkpoint.CheckpointError as error:
        st.info(f"{str(error).split(': run')[0]}. This command writes one; --tokens=20000 is quicker:")
        st.code(f"python -m analysis {shown_path(listed.path)}", language="bash")
        return None


def feature_link(column: Any, listed: checkpoint.Listed, feature: int) -> None:
    """A link to a feature's dashboard, where there is an analysis."""
    if (listed.path / "analysis" / "meta.json").exists():
        query = {"checkpoint": listed.path.name, "feature": str(feature)}
        column.page_link(
            "pages/features.py", label="Its dashboard", icon=":material/arrow_forward:", query_params=query
        )


@contextmanager
def sentences() -> Iterator[None]:
    """A file that turns out to be damaged ends the page with its sentence, not with a traceback."""
    try:
        yield
    except checkpoint.CheckpointError as error:
        st.error(str(error))
        st.stop()


def shown_path(path: Path) -> str:
    """A path as one types it beside app.py."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def modified(file: Path) -> float:
    """When a file was changed, 0 where there is none: the key of what is cached of it."""
    return file.stat().st_mtime if file.exists() else 0.0
