"""Two to four checkpoints side by side: figures, the same prompt in each, and which features are the same."""

import os

import pandas as pd
import streamlit as st

from analysis.prompt import run as analysis
from analysis.runs import tables
from pages.charts import common as charts
from pages.charts import compare as compare_charts
from pages.sections import matched
from pages.sections.matched import Side
from pages.shared import common, live
from trainer.checkpoint import CheckpointError

ORDINALS = ("first", "second", "third", "fourth")
NONE, ALL = "none", "all"
VIEWS = ("Figures", "One prompt", "Features")
FIGURES = ("L0", "MSE", "FVU", "CE_sae", "CE_score", "KL_sae", "KL_score", "dead_fraction")


def pick() -> list[Side]:
    """Choose two to four checkpoints; says so where they are not comparable."""
    available = common.readable()
    by_name = {each.name: each for each in available}
    picked = []
    for ordinal, key, column in zip(ORDINALS, "abcd", [*st.columns(2), *st.columns(2)], strict=True):
        label = f"{ordinal.title()} checkpoint"
        with column:
            if key in "ab":
                picked.append(common.pick_checkpoint(available, label, key, index="ab".index(key)))
            elif (name := st.selectbox(label, [NONE, *by_name], key=key, bind="query-params")) != NONE:
                picked.append(by_name[name])
    chosen = list({each.path: each for each in picked}.values())
    if len(chosen) == 1:
        st.info("Both are the same checkpoint: pick another one to compare it with.")
    elif len(chosen) < len(picked):
        st.info("One checkpoint is picked twice, and shown once.")
    for key, what in (("model", "the same model and layer"), ("text", "the same text")):
        if any(getattr(each.config, key) != getattr(chosen[0].config, key) for each in chosen):
            st.warning(
                f"The {'two' if len(chosen) == 2 else 'checkpoints'} were not trained on {what}: compare their figures "
                "with care."
            )
    short = compare_charts.short_names([each.name for each in chosen])
    return [Side(*each) for each in zip(ORDINALS, chosen, short, charts.PALETTE, strict=False)]


def figures(sides: list[Side]) -> None:
    """Held-out figures with differences from the first, and L0 over tokens."""
    found = [(side, each) for side in sides if (each := common.evaluation(side.listed))]
    if not found:
        return
    kept = [side for side, _ in found]
    evaluated = common.pick_text([each for _, each in found])
    counts = [each["n_tokens"] for each in evaluated]
    if len(set(counts)) > 1:
        listed = f"{', '.join(f'{n:,}' for n in counts[:-1])} and {counts[-1]:,}"
        st.warning(
            f"Evaluated on {listed} tokens: `python -m trainer.evaluate` with the same --tokens makes them equal."
        )
    frame = pd.DataFrame({"figure": FIGURES})
    for side, each in zip(kept, evaluated, strict=True):
        frame[side.ordinal] = pd.to_numeric(pd.Series([each[key] for key in FIGURES], dtype=object))
    differences = {f"{side.ordinal} - first": side for side in kept[1:] if kept[0].ordinal == "first"}
    for column, side in differences.items():
        frame[column] = frame[side.ordinal] - frame["first"]
    st.dataframe(
        frame,
        hide_index=True,
        column_config={
            "figure": st.column_config.TextColumn(width=110),
            **{side.ordinal: st.column_config.NumberColumn(header(side, len(sides)), format="%.4f", help=side.name)
               for side in kept},
            **{column: st.column_config.NumberColumn(format="%+.4f") for column in differences},
        },
    )  # fmt: skip
    st.caption("None is a score that is not measurable on this text.")
    st.subheader("L0 per token", anchor=False)
    st.caption("The last bin of a panel holds all larger values too.")
    block, dense = [], []
    for side, each in zip(kept, evaluated, strict=True):
        histogram = tables.histograms(each).assign(name=side.label)
        (dense if side.dense else block).append(histogram.assign(head="all heads") if side.dense else histogram)
    if block:
        draw_histograms(block, sides)
    if dense:
        st.caption("A dense SAE has no heads of its own: its L0 is that of the layer, in one panel.")
        draw_histograms(dense, sides)


def draw_histograms(parts: list[pd.DataFrame], sides: list[Side]) -> None:
    """L0 of one panel a head, checkpoints overlaid."""
    binned = compare_charts.binned(pd.concat(parts, ignore_index=True))
    st.altair_chart(compare_charts.l0_histograms(binned, colours(sides)), width="content")


def merging(sides: list[Side]) -> None:
    """L0 where redundant features count once, of those that are analysed."""
    st.subheader("L0 where redundant features count once", anchor=False)
    curves, without = [], []
    for side in sides:
        try:
            read = common.load_analysis(side.listed)
            l0 = read.meta["redundancy"]["l0"]
            curves.append(read.merging.assign(name=side.label, share=lambda f, l0=l0: f["L0"] / l0))
        except CheckpointError as error:
            without.append((side, error.reason.replace(f"{common.folder()}{os.sep}", "")))
    if curves:
        criterion = st.segmented_control(
            "Features of two heads are linked by", list(charts.CRITERIA), default="both", required=True,
            format_func=charts.CRITERIA.get, key="criterion", bind="query-params",
        )  # fmt: skip
        frame = pd.concat(curves)
        frame = frame[frame["criterion"] == criterion]
        for column, share in zip(st.columns(2), (False, True), strict=True):
            column.altair_chart(compare_charts.merging(frame, colours(sides), share))
    if without:
        st.text("\n".join(reason for _, reason in without))
        st.caption("L0 after merging comes from an analysis, which this command writes:")
        paths = " ".join(common.shown_path(side.listed.path) for side, _ in without)
        st.code(f"python -m analysis {paths} --tokens=20000", language="bash")


def one_prompt(sides: list[Side], runs: list[analysis.PromptRun], head: int | None, position: int | None) -> None:
    """The features of a prompt that fire in each checkpoint, two side by side, and the roles of its heads."""
    span = None if position is None else (position, position)
    maps = [analysis.firing_map(run) for run in runs]
    columns = ["feature", "head", "token", "activation", "reads from", "slot"]
    largest = max(int(each["active"].max()) for each in maps)
    for start in range(0, len(sides), 2):
        for column, side, run, each in zip(st.columns(2), sides[start:], runs[start:], maps[start:], strict=False):
            with column:
                st.text(side.label)
                st.altair_chart(charts.firing_map(each, largest))
                st.dataframe(
                    analysis.active_features(run, None if run.dense else head, span, limit=50),
                    hide_index=True,
                    height=260,
                    column_order=[name for name in columns if name != "head" or not run.dense],
                    column_config={
                        "feature": st.column_config.NumberColumn(width=55),
                        "head": st.column_config.NumberColumn(width=40),
                        "token": st.column_config.TextColumn(width=75),
                        "activation": st.column_config.NumberColumn(format="%.3f", width=60),
                        "reads from": st.column_config.TextColumn(width=80),
                        "slot": st.column_config.TextColumn(width=65),
                    },
                )
    st.markdown(
        "**The role of each head on this prompt**: the slot that it attends to most, and the one its features read most"
    )
    roles, config = [], {}
    for side, run in zip(sides, runs, strict=True):
        role = analysis.role_table(analysis.roles(run)).set_index("head")
        by_attention = role[["by attention", "attention share"]]
        if not roles or not by_attention.equals(roles[0]):  # the same in SAEs of one layer
            suffix = f" {side.ordinal}" if roles else ""
            roles.append(by_attention.add_suffix(suffix))
            config[f"attention share{suffix}"] = st.column_config.NumberColumn("share", format="percent", width=60)
        roles.append(role[["by DFA", "DFA share"]].add_suffix(f" {side.ordinal}"))
        title = f"by DFA, {header(side, len(sides))}"
        config[f"by DFA {side.ordinal}"] = st.column_config.TextColumn(title, help=side.name)
        config[f"DFA share {side.ordinal}"] = st.column_config.NumberColumn("share", format="percent", width=60)
    st.dataframe(pd.concat(roles, axis=1).reset_index(), hide_index=True, column_config=config)


def colours(sides: list[Side]) -> dict[str, str]:
    return {side.label: side.colour for side in sides}


def header(side: Side, n: int) -> str:
    """Of a column: four names are too wide."""
    return f"{side.ordinal}: {side.short}" if n < 3 else side.ordinal


common.begin(
    "Compare",
    "Two to four checkpoints side by side: their held-out figures, the same prompt in each, and which features of one "
    "are those of another.",
)
sides = pick()
view = st.segmented_control("Show", VIEWS, default=VIEWS[0], required=True, key="show", bind="query-params")
if view == "Figures":
    figures(sides)
    merging(sides)
    st.stop()

prompt = live.prompt_box()
runs = [live.prompt_run(side.listed, prompt) for side in sides]
same_tokens = all(run.strings == runs[0].strings for run in runs)
left, right = st.columns(2)
heads = [ALL, *map(str, range(len(runs[0].pattern)))]
head = common.select(left, "Head", heads, "head")
positions = {ALL: None} | {runs[0].label(p): p for p in range(1, len(runs[0].strings)) if same_tokens}
different = None if same_tokens else "the models cut this prompt into different tokens"
token = common.select(right, "Token", list(positions), "token", help=different)
where = None if head == ALL else int(head), positions[token]
if view == "One prompt":
    one_prompt(sides, runs, *where)
elif len(sides) > 1:
    other = "second"
    if len(sides) > 2:
        options = ORDINALS[1 : len(sides)]
        other = st.segmented_control(
            "Match the first with the", options, default="second", required=True, key="against", bind="query-params"
        )
    pair = [0, ORDINALS.index(other)]
    matched.show([sides[i] for i in pair], [runs[i] for i in pair], *where)
