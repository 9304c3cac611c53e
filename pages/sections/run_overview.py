"""All runs of the checkpoint folder, and the commands, W&B and log of one of them."""

import shlex
import time

import pandas as pd
import streamlit as st

from analysis.runs import commands, progress, tables
from pages.sections import run_form
from pages.shared.address import permalink
from pages.shared.columns import draw_table
from pages.shared.page import ARROW, refuse, typed
from pages.shared.pick import pick_checkpoint, pick_row, readable
from trainer.checkpoint import Checkpoint, CheckpointError


@st.fragment(run_every="5s")  # runs go on while one looks
@permalink()
def show() -> None:
    """The table of all runs, what is not complete first; and one of them."""
    checkpoints = readable()
    frame = progress.progress(checkpoints, time.time())
    waits = frame["state"].isin(["complete", "imported"])
    frame = frame.assign(waits=waits).sort_values(["waits", "name"]).drop(columns="waits")
    _draw_progress(frame)
    run = pick_checkpoint(checkpoints, "Run", "run")
    st.page_link(
        "pages/tradeoffs.py",
        label="Its training curves, on Tradeoffs",
        icon=ARROW,
        query_params={"site": run.site, "runs": run.name},
    )
    _draw_commands(run, frame.set_index("name").loc[run.name, "state"])
    _draw_wandb(run)
    _draw_log(run)


def _draw_progress(frame: pd.DataFrame) -> None:
    durations = {key: frame[key].map(progress.ago, na_action="ignore") for key in ("last_line", "left")}
    order = ["name", "state", "done", "step", "steps", "last_line", "left", "tokens_per_second", *progress.SHOWN]
    draw_table(frame.assign(**durations), column_order=order, **pick_row("progress", "run", list(frame["name"])))
    st.caption(
        "Figures are of the last training batch that was logged. A run counts as stopped when it has logged nothing "
        "for five times its usual interval (a minute at least), or for an hour after its last step. Tick a row to see "
        "its commands."
    )


def _draw_commands(run: Checkpoint, state: str) -> None:
    """The commands that resume and repeat a run, or why there are none."""
    shown = typed(run.path.resolve())
    again, number = f"{run.name}-again", 2
    while (run.path.parent / again).exists():
        again, number = f"{run.name}-again-{number}", number + 1
    try:
        on, anew = commands.resume(run, shown), commands.repeat(run, shown, again)
    except ValueError as error:
        st.text(f"No command: {error}")
        return
    if not run.is_complete:
        saved = progress.saved_step(run.path)
        begins = f"from step {saved:,}, its last save" if saved else "from the beginning, because it has not saved yet"
        st.markdown(f"**Resume it** {begins}" + ("" if state == "stopped" else ": only once it has stopped"))
        st.code(commands.shell(on), language="bash", wrap_lines=True)
        if run_form.training_allowed() and state == "stopped":
            label = "Resume in the background"
            st.button(label, key="resume_run", on_click=run_form.start, args=(on, [run.name]))
    st.markdown("**Repeat it**, under another name, because no checkpoint is overwritten")
    st.code(commands.shell(anew), language="bash", wrap_lines=True)


def _draw_wandb(run: Checkpoint) -> None:
    """Where W&B has the run, or how it gets there."""
    url, folders = run.config.wandb_url or "", progress.unsent(run.path)
    if url.startswith("https://"):  # config.json may come from somebody else
        st.link_button("Open the run on Weights & Biases", url)
    if folders:
        st.markdown("**Weights & Biases**: logged offline. To send it:")
        names = shlex.join(typed(folder.resolve()) for folder in folders)
        st.code(f"wandb sync {names}", language="bash", wrap_lines=True)


def _draw_log(run: Checkpoint) -> None:
    st.markdown("**Last lines of metrics.jsonl**")
    try:
        lines = tables.curves([run]).tail(8)
    except CheckpointError as error:
        refuse(error)
        return
    if lines.empty:
        st.caption("Nothing is logged yet.")
    else:
        st.dataframe(lines.drop(columns="name").iloc[::-1], hide_index=True)  # as logged
