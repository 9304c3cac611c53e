"""A form for new trainings, and the trainings that this server runs in the background."""

import sys
import time
from typing import Any, get_args

import streamlit as st

from analysis.runs import commands, progress
from analysis.runs.background import Processes, tail
from pages.shared.page import ROOT, folder, refuse, typed
from pages.shared.pick import number
from trainer.config import Preset, TrainingConfig
from trainer.recipes import RECIPES

_DEFAULT = "default"


def training_allowed() -> bool:
    """Whether whoever started the server lets its users train on it, and other sites' pages cannot press the button."""
    return "--allow-training" in sys.argv[1:] and bool(st.get_option("server.enableCORS"))


def start(arguments: list[str], names: list[str]) -> None:
    """Run a command in the background, or keep the reason why not for `started`."""
    try:
        _processes().start(arguments, names, folder().resolve(), ROOT)
    except ValueError as error:
        st.session_state["refused"] = str(error)


def show() -> None:
    """The form, the command that it makes, and where it is allowed the button that runs it."""
    st.header("Train")
    out = typed(folder().resolve())
    try:
        arguments, names = commands.compose(_choices(), folder().resolve(), out)
    except ValueError as error:
        refuse(error)
        return
    st.code(commands.shell(arguments), language="bash", wrap_lines=True)
    st.text(f"Makes {', '.join(names)} in {out}/")
    if training_allowed():
        st.button("Train in the background", key="train", type="primary", on_click=_start_shown)
    else:
        st.caption(
            "Copy the command to run it. A server started with `streamlit run app.py -- --allow-training` can also run "
            "it in the background."
        )


def started() -> None:
    """What was started in the background, also before the server was restarted; where that is allowed."""
    if training_allowed():
        st.subheader("Started in the background")
        _draw_started()


@st.cache_resource(show_spinner=False)
def _processes() -> Processes:
    """One for all sessions."""
    return Processes()


def _choices() -> dict[str, Any]:
    """The fields of the form, by the name of their option; None is the default."""
    helps = commands.explanations()
    drawn: list[str] = []

    def pick(column: Any, key: str, *options: str) -> None:
        column.selectbox(key, [_DEFAULT, *options], key=key, bind="query-params", help=helps[key])
        drawn.append(key)

    def write(column: Any, key: str, example: str = _DEFAULT) -> None:
        column.text_input(key, key=key, bind="query-params", help=helps[key], placeholder=example)
        drawn.append(key)

    def count(column: Any, key: str, default: int | None = None, **limits: Any) -> None:
        default = getattr(TrainingConfig, key, default)
        number(column, key, value=default, key=key, help=helps[key], placeholder=_DEFAULT, **limits)
        drawn.append(key)

    a, b, c, d = st.columns(4)
    write(a, "model", "smollm2-135m")
    write(b, "dataset")
    count(c, "hook_layer", 17, step=1)
    write(d, "name")
    a, b, c, d = st.columns(4)
    pick(a, "preset", *get_args(Preset))
    pick(b, "recipe", *RECIPES)
    write(c, "k", "32, or several: 16, 32, 64")
    write(d, "l1_coefficients", "2, or several: 1, 2, 4")
    a, b, c, d = st.columns(4)
    pick(a, "block", "head", "dense")
    count(b, "expansion_factor", step=1)
    pick(c, "normalize", "per_head", "global", "none")
    count(d, "lr", step=1e-4, format="%.6g")
    a, b, c, d = st.columns(4)
    count(a, "total_training_steps", step=100)
    count(b, "batch_size", step=256)
    count(c, "distinct_tokens", step=10_000)
    count(d, "eval_tokens", step=1024)
    a, b, c, d = st.columns(4)
    count(a, "context_size", step=1)
    count(b, "seed", step=1)
    write(c, "device", "auto")
    pick(d, "wandb", "online", "offline", "disabled")
    st.session_state["form"] = drawn
    return _read(drawn)


def _read(keys: list[str]) -> dict[str, Any]:
    """What the fields hold now."""
    choices: dict[str, Any] = {}
    for key in keys:
        value = st.session_state[key]
        value = value.strip() if isinstance(value, str) else value
        choices[key] = None if value in ("", _DEFAULT) else value
    for key, kind in (("k", int), ("l1_coefficients", float)):
        choices[key] = commands.numbers(choices[key] or "", kind, key)
    return choices


def _start_shown() -> None:
    """Train what the fields hold at the click: one may have changed since the button was drawn."""
    where = folder().resolve()
    try:
        start(*commands.compose(_read(st.session_state["form"]), where, typed(where)))
    except ValueError as error:
        st.session_state["refused"] = str(error)


@st.fragment(run_every="3s")
def _draw_started() -> None:
    """The background trainings, with the end of their output."""
    if refused := st.session_state.pop("refused", None):
        refuse(refused)
    processes = _processes().all(folder().resolve())
    if not processes:
        st.caption("Nothing was started from here yet. A training that is started goes on when this page is closed.")
    for process in processes:
        with st.container(border=True):
            left, right = st.columns([5, 1], vertical_alignment="center")
            what = "started" if process.popen else "last output"
            which = f", process {process.pid}" if process.pid else ""
            since = progress.ago(time.time() - process.when)
            left.text(f"{', '.join(process.names)}: {process.state}, {what} {since} ago{which}")
            if process.state == "running" and process.pid:
                right.button("Cancel", key=f"cancel {process.names[0]}", on_click=process.cancel)
            st.code(tail(process.log) or "No output yet.", language=None, wrap_lines=True)
