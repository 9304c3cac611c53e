"""Two to four checkpoints side by side: their figures, L0 after merging, and one prompt in each."""

import shlex
from typing import Any, NamedTuple

import pandas as pd
import streamlit as st

from analysis.prompt.run import PromptRun, active_features, firing_map, role_table, roles
from analysis.runs import tables
from pages.charts import compare as charts
from pages.charts import prompt as prompt_charts
from pages.charts.common import CRITERIA, PALETTE
from pages.shared import live
from pages.shared.columns import draw_table
from pages.shared.page import plain, typed
from pages.shared.pick import ALL, choose, pick_checkpoint, pick_head, pick_text, select
from pages.shared.words import in_words
from trainer.checkpoint import Checkpoint, CheckpointError

ORDINALS = ("first", "second", "third", "fourth")
_NONE = "none"
_FIGURES = ("L0", "MSE", "FVU", "CE_sae", "CE_score", "KL_sae", "KL_score", "norm_ratio", "bias", "silent_fraction")
_SPOKEN = {"silent_fraction": "silent", "CE_sae": "CE with the SAE", "KL_sae": "KL with the SAE"}


class Shown(NamedTuple):
    """A compared checkpoint, as the page shows it."""

    ordinal: str
    checkpoint: Checkpoint
    short: str
    """its name without the words that all of them begin with"""
    colour: str
    """on the whole page"""

    @property
    def label(self) -> str:
        return f"{self.ordinal}: {self.checkpoint.name}"


def pick(checkpoints: list[Checkpoint]) -> list[Shown]:
    """Choose two to four checkpoints; says so where they are not comparable."""
    by_name = {checkpoint.name: checkpoint for checkpoint in checkpoints}
    picked = []
    for ordinal, key, column in zip(ORDINALS, "abcd", [*st.columns(2), *st.columns(2)], strict=True):
        label = f"{ordinal.title()} checkpoint"
        with column:
            if key in "ab":
                picked.append(pick_checkpoint(checkpoints, label, key, index="ab".index(key)))
            elif (name := st.selectbox(label, [_NONE, *by_name], key=key, bind="query-params")) != _NONE:
                picked.append(by_name[name])
    chosen = list({checkpoint.path: checkpoint for checkpoint in picked}.values())
    if len(chosen) == 1:
        st.info("Both are the same checkpoint: pick another one to compare it with.")
    elif len(chosen) < len(picked):
        st.info("One checkpoint is picked twice, and shown once.")
    for part, what in (("model", "the same model and layer"), ("text", "the same text")):
        if any(getattr(checkpoint.config, part) != getattr(chosen[0].config, part) for checkpoint in chosen):
            st.warning(
                f"The {'two' if len(chosen) == 2 else 'checkpoints'} were not trained on {what}: compare their figures "
                "with care."
            )
    short = short_names([checkpoint.name for checkpoint in chosen])
    return [Shown(*parts) for parts in zip(ORDINALS, chosen, short, PALETTE, strict=False)]


def short_names(names: list[str]) -> list[str]:
    """Names without the words that all of them begin with, for the heads of columns."""
    words = [name.split("-") for name in names]
    shared = 0
    while len({tuple(name[: shared + 1]) for name in words}) == 1 and all(len(name) > shared + 1 for name in words):
        shared += 1
    return ["-".join(name[shared:]) for name in words] if len(names) > 1 else names


def run(shown: list[Shown], prompt: str) -> list[PromptRun]:
    """The prompt through each; where they share a model, the slots of all are those of the first."""
    first = shown[0].checkpoint
    return [
        live.run_prompt(each, prompt, first if each.config.model == first.config.model else None)
        for each in (one.checkpoint for one in shown)
    ]


def pick_place(runs: list[PromptRun]) -> tuple[int | None, int | None]:
    """A head and a position of a prompt; None for all of them."""
    first = runs[0]
    same_tokens = all(run.strings == first.strings for run in runs)
    left, right = st.columns(2)
    head = pick_head(len(first.pattern), column=left)
    positions = {ALL: None} | {first.labels[p]: p for p in range(1, len(first.strings)) if same_tokens}
    different = None if same_tokens else "the models cut this prompt into different tokens"
    return head, positions[select(right, "Token", list(positions), "token", help=different)]


def figures(shown: list[Shown]) -> None:
    """Held-out figures with differences from the first, and L0 over tokens."""
    evaluated = [(one, evaluation) for one in shown if (evaluation := live.figures_or_hint(one.checkpoint))]
    if not evaluated:
        return
    if pick_text():
        evaluated = [(one, evaluation["induction"]) for one, evaluation in evaluated]
    counts = [evaluation["n_tokens"] for _, evaluation in evaluated]
    if len(set(counts)) > 1:
        evaluated_on = f"{', '.join(f'{n:,}' for n in counts[:-1])} and {counts[-1]:,}"
        st.warning(
            f"Evaluated on {evaluated_on} tokens: `python -m trainer.evaluate` with the same --tokens makes them equal."
        )
    _draw_figures(evaluated, len(shown))
    st.subheader("L0 per token", anchor=False)
    st.caption("The last bin of a panel holds all larger values too.")
    block, dense = [], []
    for one, evaluation in evaluated:
        histogram = tables.histograms(evaluation).assign(name=one.label)
        if one.checkpoint.is_dense:
            dense.append(histogram.assign(head="all heads"))
        else:
            block.append(histogram)
    if block:
        _draw_l0(block, shown)
    if dense:
        st.caption("A dense SAE has no heads of its own: its L0 is that of the layer, in one panel.")
        _draw_l0(dense, shown)


def _draw_l0(histograms: list[pd.DataFrame], shown: list[Shown]) -> None:
    binned = tables.binned(pd.concat(histograms, ignore_index=True))
    st.altair_chart(charts.l0_histograms(binned, _colours(shown)), width="content")


def _draw_figures(evaluated: list[tuple[Shown, dict[str, Any]]], n_shown: int) -> None:
    missing = [key for key in _FIGURES if all(evaluation.get(key) is None for _, evaluation in evaluated)]
    keys = [key for key in _FIGURES if key not in missing]
    frame = pd.DataFrame({"figure": [_SPOKEN.get(key, key.replace("_", " ")) for key in keys]})
    settings: dict[str, Any] = {"figure": 110}
    for one, evaluation in evaluated:
        for column, end in ((one.ordinal, ""), (f"{one.ordinal} ±", "_se")):
            frame[column] = pd.to_numeric(pd.Series([evaluation.get(key + end) for key in keys], dtype=object))
        title, name = _header(one, n_shown), one.checkpoint.name
        settings[one.ordinal] = st.column_config.NumberColumn(title, format="%.4f", help=plain(name))
        settings[f"{one.ordinal} ±"] = st.column_config.NumberColumn("±", format="%.4f", help="one standard error")
    for one, _ in evaluated:
        if "first" in frame and one.ordinal != "first":
            column = f"{one.ordinal} - first"
            frame[column] = frame[one.ordinal] - frame["first"]
            settings[column] = st.column_config.NumberColumn(format="%+.4f")
    draw_table(frame, settings)
    notes = (
        "± is one standard error, clustered by context; it is no error of a difference, because the text is the same."
    )
    if missing:
        notes += f" Not measurable on this text: {', '.join(missing).replace('_', ' ')}."
    elif frame[[one.ordinal for one, _ in evaluated]].isna().any(axis=None):
        notes += " None is a score that is not measurable on this text."
    st.caption(notes)
    for one, evaluation in evaluated:
        for key in tables.SCORES:
            if word := tables.outside(evaluation[key]):
                st.text(f"{one.ordinal}: {key.replace('_', ' ')} {word}")


def merging(shown: list[Shown]) -> None:
    """L0 where redundant features count once, of those that are analysed."""
    st.subheader("L0 where redundant features count once", anchor=False)
    curves, reasons, missing = [], [], []
    for one in shown:
        try:
            analysis = live.read_analysis(one.checkpoint)
            share = analysis.merging["L0"] / analysis.meta["redundancy"]["l0"]
            curves.append(analysis.merging.assign(name=one.label, share=share))
        except CheckpointError as error:
            reasons.append(typed(error.reason))
            missing.append(typed(one.checkpoint.path))
    if curves:
        label = "Features of two heads are linked by"
        criterion = choose(label, CRITERIA, "criterion", format_func=CRITERIA.get)
        frame = pd.concat(curves)
        frame = frame[frame["criterion"] == criterion]
        for column, as_share in zip(st.columns(2), (False, True), strict=True):
            column.altair_chart(charts.merging(frame, _colours(shown), as_share))
    if missing:
        st.text("\n".join(reasons))
        st.caption("L0 after merging comes from an analysis, which this command writes:")
        st.code(f"python -m analysis {shlex.join(missing)} --tokens=20000", language="bash")


def one_prompt(shown: list[Shown], runs: list[PromptRun], head: int | None, position: int | None) -> None:
    """The features of a prompt that fire in each checkpoint, two side by side, and the roles of its heads."""
    span = None if position is None else (position, position)
    maps = [firing_map(run) for run in runs]
    largest = max(int(counts["active"].max()) for counts in maps)
    widths = {"feature": 55, "head": 40, "token": 75, "reads from": 80, "slot": 65}
    for start in range(0, len(shown), 2):
        for column, one, run, counts in zip(st.columns(2), shown[start:], runs[start:], maps[start:], strict=False):
            with column:
                st.text(one.label)
                st.altair_chart(prompt_charts.firing_map(counts, largest))
                features = active_features(run, None if run.dense else head, span, limit=20)
                features = features.assign(words=in_words(one.checkpoint, features["feature"]))
                order = ["feature", "head", "token", "activation", "reads from", "slot", "words"]
                hidden = {"head": None} if run.dense else {}
                draw_table(
                    features,
                    {**widths, "activation": 60, "words": "in words", **hidden},
                    height=260,
                    column_order=order,
                )
    st.markdown(
        "**The role of each head on this prompt**: the slot that it attends to most, and the one its features read most"
    )
    columns: list[pd.DataFrame] = []
    settings: dict[str, Any] = {}
    percent = st.column_config.NumberColumn("share", format="percent", width=60)
    for one, run in zip(shown, runs, strict=True):
        role = role_table(roles(run)).set_index("head")
        by_attention = role[["by attention", "attention share"]]
        if not columns or not by_attention.equals(columns[0]):  # the same in SAEs of one layer
            suffix = f" {one.ordinal}" if columns else ""
            columns.append(by_attention.add_suffix(suffix))
            settings[f"attention share{suffix}"] = percent
        columns.append(role[["by DFA", "DFA share"]].add_suffix(f" {one.ordinal}"))
        title = f"by DFA, {_header(one, len(shown))}"
        settings[f"by DFA {one.ordinal}"] = st.column_config.TextColumn(title, help=plain(one.checkpoint.name))
        settings[f"DFA share {one.ordinal}"] = percent
    draw_table(pd.concat(columns, axis=1).reset_index(), settings)


def _colours(shown: list[Shown]) -> dict[str, str]:
    return {one.label: one.colour for one in shown}


def _header(one: Shown, n_shown: int) -> str:
    """Of a column: four names are too wide."""
    return f"{one.ordinal}: {one.short}" if n_shown < 3 else one.ordinal
