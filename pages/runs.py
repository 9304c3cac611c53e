"""Trainings in the checkpoint folder: how far they are, the commands that repeat or resume them, and new ones."""

import sys
import time
from functools import partial
from typing import Any

import pandas as pd
import streamlit as st

from analysis.runs import commands, progress, tables
from analysis.runs.background import Processes, tail
from pages.shared import common
from trainer.checkpoint import Checkpoint, CheckpointError

DEFAULT = "default"
FOLDER = common.folder().resolve()
OUT = common.shown_path(FOLDER)


def training_allowed() -> bool:
    """Whether whoever started the server lets its users train on it."""
    return "--allow-training" in sys.argv[1:]


@st.cache_resource(show_spinner=False)
def processes() -> Processes:
    """One for all sessions."""
    return Processes()


def pick_run(names: list[str]) -> None:
    """A click on the table chooses its run."""
    rows = st.session_state["progress"]["selection"]["rows"]
    if rows:
        st.session_state["run"] = names[rows[0]]


@st.fragment(run_every="5s")  # runs go on while one looks
def overview() -> None:
    """All runs, and one of them."""
    listed = common.readable()
    frame = progress.progress(listed, time.time())
    waits = frame["state"].isin(["complete", "imported"])
    frame = frame.assign(waits=waits).sort_values(["waits", "name"]).drop(columns="waits")
    draw_progress(frame)
    each = common.pick_checkpoint(listed, "Run", "run")
    draw_run(each, frame.set_index("name").loc[each.name])


def draw_progress(frame: pd.DataFrame) -> None:
    """The table of all runs."""
    durations = {key: frame[key].map(progress.ago, na_action="ignore") for key in ("last_line", "left")}
    st.dataframe(
        frame.assign(**durations),
        column_order=[
            "name",
            "state",
            "done",
            "step",
            "steps",
            "last_line",
            "left",
            "tokens_per_second",
            *progress.SHOWN,
        ],
        hide_index=True,
        width="stretch",
        key="progress",
        on_select=partial(pick_run, list(frame["name"])),
        selection_mode="single-row",
        column_config={
            "name": st.column_config.TextColumn(pinned=True),
            "step": st.column_config.NumberColumn(format="localized"),
            "steps": st.column_config.NumberColumn("of", format="localized"),
            "done": st.column_config.ProgressColumn(format="percent", min_value=0, max_value=1, width=110),
            "tokens_per_second": st.column_config.NumberColumn("tokens/s", format="localized", step=1),
            "loss": st.column_config.NumberColumn(format="%.4g"),
            "L0": st.column_config.NumberColumn(format="%.1f"),
            "FVU": st.column_config.NumberColumn(format="%.3f"),
            "last_line": st.column_config.TextColumn("last line ago"),
            "left": st.column_config.TextColumn("left"),
        },
    )
    st.caption(
        "Figures are of the last training batch that was logged. A run counts as stopped when it has logged nothing "
        "for five times its usual interval (a minute at least), or for an hour after its last step. Tick a row to see "
        "its commands."
    )


def draw_run(each: Checkpoint, row: pd.Series) -> None:
    """Commands, W&B and log of one run."""
    st.page_link(
        "pages/tradeoffs.py",
        label="Its training curves, on Tradeoffs",
        icon=":material/arrow_forward:",
        query_params={"site": each.site, "runs": each.name},
    )
    try:
        draw_commands(each, row)
    except ValueError as error:
        st.text(f"No command: {error}")
    draw_wandb(each)
    st.markdown("**Last lines of metrics.jsonl**")
    try:
        lines = tables.curves([each]).tail(8)
    except CheckpointError as error:
        st.error(str(error))
        return
    if lines.empty:
        st.caption("Nothing is logged yet.")
    else:
        st.dataframe(lines.drop(columns="name").iloc[::-1], hide_index=True, width="stretch")


def draw_commands(each: Checkpoint, row: pd.Series) -> None:
    """The commands that resume and repeat a run."""
    path, shown = each.path, common.shown_path(each.path.resolve())
    if not each.is_complete:
        arguments = commands.resume(each, shown)
        saved = progress.saved_step(path)
        begins = f"from step {saved:,}, its last save" if saved else "from the beginning, because it has not saved yet"
        if row["state"] == "stopped":
            st.markdown(f"**Resume it** {begins}")
        else:
            st.markdown(f"**Resume it** {begins}: only once it has stopped")
        st.code(commands.shell(arguments), language="bash", wrap_lines=True)
        if training_allowed() and row["state"] == "stopped":
            st.button("Resume in the background", key="resume_run", on_click=start, args=(arguments, [path.name]))
    again = f"{path.name}-again"
    number = 2
    while (path.parent / again).exists():
        again, number = f"{path.name}-again-{number}", number + 1
    st.markdown("**Repeat it**, under another name, because no checkpoint is overwritten")
    st.code(commands.shell(commands.repeat(each, shown, again)), language="bash", wrap_lines=True)


def draw_wandb(each: Checkpoint) -> None:
    """Where W&B has the run, or how it gets there."""
    url, folders = each.config.wandb_url or "", progress.unsent(each.path)
    if url.startswith("https://"):  # config.json may come from somebody else
        st.link_button("Open the run on Weights & Biases", url)
    if folders:
        st.markdown("**Weights & Biases**: logged offline. To send it:")
        names = " ".join(common.shown_path(folder.resolve()) for folder in folders)
        st.code(f"wandb sync {names}", language="bash", wrap_lines=True)


def start(arguments: list[str], names: list[str]) -> None:
    """Run a command in the background, or keep the reason why not for `started`."""
    try:
        processes().start(arguments, names, FOLDER, common.ROOT)
    except ValueError as error:
        st.session_state["refused"] = str(error)


def choices() -> dict[str, Any]:
    """The fields of the form, by the name of their option; None is the default."""
    helps = commands.explanations()

    def pick(column: Any, key: str, options: list[str]) -> str | None:
        chosen = column.selectbox(key, [DEFAULT, *options], key=key, bind="query-params", help=helps[key])
        return None if chosen == DEFAULT else chosen

    def write(column: Any, key: str, example: str = DEFAULT) -> str | None:
        text = column.text_input(key, key=key, bind="query-params", help=helps[key], placeholder=example)
        return text.strip() or None

    def count(column: Any, key: str, default: int | float | None = None, **limits: Any) -> Any:
        return column.number_input(
            key, value=default, key=key, bind="query-params", help=helps[key], placeholder=DEFAULT, **limits
        )

    found: dict[str, Any] = {}
    a, b, c, d = st.columns(4)
    found["model"] = write(a, "model", "smollm2-135m")
    found["dataset"] = write(b, "dataset")
    found["hook_layer"] = count(c, "hook_layer", 17, step=1)
    found["name"] = write(d, "name")
    a, b, c, d = st.columns(4)
    found["preset"] = pick(a, "preset", ["reference", "kissane"])
    found["recipe"] = pick(b, "recipe", ["april", "bricken", "gated", "jumprelu", "topk", "batchtopk"])
    found["k"] = commands.numbers(write(c, "k", "32, or several: 16, 32, 64") or "", int, "k")
    coefficients = write(d, "l1_coefficients", "2, or several: 1, 2, 4") or ""
    found["l1_coefficients"] = commands.numbers(coefficients, float, "l1_coefficients")
    a, b, c, d = st.columns(4)
    found["block"] = pick(a, "block", ["head", "dense"])
    found["expansion_factor"] = count(b, "expansion_factor", step=1)
    found["normalize"] = pick(c, "normalize", ["per_head", "global", "none"])
    found["lr"] = count(d, "lr", step=1e-4, format="%.6g")
    a, b, c, d = st.columns(4)
    found["total_training_steps"] = count(a, "total_training_steps", 2000, step=100)
    found["batch_size"] = count(b, "batch_size", 4096, step=256)
    found["distinct_tokens"] = count(c, "distinct_tokens", step=10_000)
    found["eval_tokens"] = count(d, "eval_tokens", 8192, step=1024)
    a, b, c, d = st.columns(4)
    found["context_size"] = count(a, "context_size", step=1)
    found["seed"] = count(b, "seed", 0, step=1)
    found["device"] = write(c, "device", "auto")
    found["wandb"] = pick(d, "wandb", ["online", "offline", "disabled"])
    return found


def train() -> None:
    """The form, the command that it makes, and where it is allowed the button that runs it."""
    st.header("Train")
    try:
        arguments, names = commands.compose(choices(), FOLDER, OUT)
    except ValueError as error:
        st.error(str(error))
        return
    st.code(commands.shell(arguments), language="bash", wrap_lines=True)
    st.text(f"Makes {', '.join(names)} in {OUT}/")
    if not training_allowed():
        st.caption(
            "Copy the command to run it. A server started with `streamlit run app.py -- --allow-training` can also run "
            "it in the background."
        )
    else:
        st.button("Train in the background", key="train", type="primary", on_click=start, args=(arguments, names))


@st.fragment(run_every="3s")
def started() -> None:
    """What this server runs in the background, with the end of its output."""
    if refused := st.session_state.pop("refused", None):
        st.error(refused)
    found = processes().all()
    if not found:
        st.caption("Nothing was started from here yet. A training that is started goes on when this page is closed.")
    for process in found:
        with st.container(border=True):
            left, right = st.columns([5, 1], vertical_alignment="center")
            since = progress.ago(time.time() - process.begun)
            left.text(f"{', '.join(process.names)}: {process.state}, started {since} ago, process {process.popen.pid}")
            if process.state == "running":
                name = process.names[0]
                right.button("Cancel", key=f"cancel {name}", on_click=processes().cancel, args=(name,))
            st.code(tail(process.log) or "No output yet.", language=None, wrap_lines=True)


common.begin(
    "Runs",
    "Trainings in the checkpoint folder, also those in progress, with the commands that repeat or resume them; and a "
    "form for new ones.",
)
above = st.container()  # drawn last: where there is no checkpoint yet the page ends there, and the form is wanted most
train()
if training_allowed():
    st.subheader("Started by this server")
    started()
with above:
    overview()
