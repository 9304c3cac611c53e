"""Two to four checkpoints side by side: figures, L0, the same prompt in each, and which features are the same."""

import os

import pandas as pd
import streamlit as st

from analysis import prompt as analysis
from analysis import tables
from pages import charts, common, compare_charts, live, matched
from trainer import checkpoint

ORDINALS = ("first", "second", "third", "fourth")
NONE, ALL = "none", "all"
FIGURES = ("L0", "MSE", "FVU", "CE_sae", "CE_score", "KL_sae", "KL_score", "dead_fraction")

common.begin(
    "Compare",
    "Two to four checkpoints side by side: their held-out figures, the same prompt in each, and which features of one "
    "are those of another.",
)

available = common.readable()
by_name = {each.path.name: each for each in available}
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
names = [each.path.name for each in chosen]
short = compare_charts.short_names(names)
labels = [f"{ordinal}: {name}" for ordinal, name in zip(ORDINALS, names, strict=False)]
headers = [f"{o}: {n}" if len(names) < 3 else o for o, n in zip(ORDINALS, short, strict=False)]  # four names are wide
colours = dict(zip(labels, charts.PALETTE, strict=False))
for key, what in (("model", "the same model and layer"), ("text", "the same text")):
    if any(each.config[key] != chosen[0].config[key] for each in chosen):
        st.warning(
            f"The {'two' if len(chosen) == 2 else 'checkpoints'} were not trained on {what}: compare their figures "
            "with care."
        )

st.subheader("Figures", anchor=False)
found = [(index, figures) for index, each in enumerate(chosen) if (figures := common.evaluation(each))]
if found:
    indices = [index for index, _ in found]
    figures = common.pick_text([each for _, each in found])
    counts = [each["n_tokens"] for each in figures]
    if len(set(counts)) > 1:
        listed = f"{', '.join(f'{n:,}' for n in counts[:-1])} and {counts[-1]:,}"
        st.warning(
            f"Evaluated on {listed} tokens: `python -m trainer.evaluate` with the same --tokens makes them equal."
        )
    frame = pd.DataFrame({"figure": FIGURES})
    for index, each in zip(indices, figures, strict=True):
        frame[ORDINALS[index]] = pd.to_numeric(pd.Series([each[key] for key in FIGURES], dtype=object))
    differences = [f"{ORDINALS[index]} - first" for index in indices[1:] if indices[0] == 0]
    for column in differences:
        frame[column] = frame[column.split(" - ")[0]] - frame["first"]
    st.dataframe(
        frame,
        hide_index=True,
        column_config={
            "figure": st.column_config.TextColumn(width=110),
            **{ORDINALS[i]: st.column_config.NumberColumn(headers[i], format="%.4f", help=names[i]) for i in indices},
            **{column: st.column_config.NumberColumn(format="%+.4f") for column in differences},
        },
    )
    st.caption("None is a score that is not measurable on this text.")
    st.subheader("L0 per token", anchor=False)
    st.caption("The last bin of a panel holds all larger values too.")
    by_kind: dict[bool, list[pd.DataFrame]] = {False: [], True: []}
    for index, each in zip(indices, figures, strict=True):
        dense = chosen[index].config["sae"]["n_heads"] != chosen[index].config["model"]["n_heads"]
        by_kind[dense].append(tables.histograms(each).assign(name=labels[index]))
    if by_kind[False]:
        histograms = compare_charts.binned(pd.concat(by_kind[False], ignore_index=True))
        st.altair_chart(compare_charts.l0_histograms(histograms, colours), width="content")
    if by_kind[True]:
        st.caption("A dense SAE has no heads of its own: its L0 is that of the layer, in one panel.")
        histograms = compare_charts.binned(pd.concat(by_kind[True], ignore_index=True).assign(head="all heads"))
        st.altair_chart(compare_charts.l0_histograms(histograms, colours), width="content")

st.subheader("L0 where redundant features count once", anchor=False)
curves, without = [], []
for label, each in zip(labels, chosen, strict=True):
    try:
        read = common.load_analysis(each.path)
        l0 = read.meta["redundancy"]["l0"]
        curves.append(read.merging.assign(name=label, share=lambda f, l0=l0: f["L0"] / l0))
    except checkpoint.CheckpointError as error:
        without.append((each, str(error).split(": run")[0].replace(f"{common.folder()}{os.sep}", "")))
if curves:
    criterion = st.segmented_control(
        "Features of two heads are linked where they", list(compare_charts.CRITERIA), default="both", required=True,
        format_func=compare_charts.CRITERIA.get, key="criterion", bind="query-params",
    )  # fmt: skip
    frame = pd.concat(curves).query("criterion == @criterion")
    for column, share in zip(st.columns(2), (False, True), strict=True):
        column.altair_chart(compare_charts.merging(frame, colours, share))
if without:
    st.text("\n".join(reason for _, reason in without))
    st.caption("L0 after merging comes from an analysis, which this command writes:")
    paths = " ".join(common.shown_path(each.path) for each, _ in without)
    st.code(f"python -m analysis {paths} --tokens=20000", language="bash")

st.subheader("The same prompt in each", anchor=False)
prompt = live.prompt_box()
runs = [live.prompt_run(each, prompt) for each in chosen]
same_tokens = all(run.strings == runs[0].strings for run in runs)
left, right = st.columns(2)
n_heads = len(runs[0].pattern)
head_choice = left.selectbox("Head", [ALL, *map(str, range(n_heads))], key="head", bind="query-params")
positions = {ALL: None} | {runs[0].label(p): p for p in range(1, len(runs[0].strings)) if same_tokens}
token = right.selectbox(
    "Token", list(positions), key="token", bind="query-params",
    help=None if same_tokens else "the models cut this prompt into different tokens",
)  # fmt: skip
head, position = None if head_choice == ALL else int(head_choice), positions[token]
span = None if position is None else (position, position)
for start in range(0, len(chosen), 2):
    for column, label, run in zip(st.columns(2), labels[start:], runs[start:], strict=False):
        with column:
            st.text(label)
            st.altair_chart(charts.firing_map(analysis.firing_map(run)))
            st.dataframe(
                analysis.active_features(run, None if run.dense else head, span, limit=50),
                hide_index=True,
                height=260,
                column_order=["feature", "head", "token", "activation", "reads from", "slot"],
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
for ordinal, header, name, run in zip(ORDINALS, headers, names, runs, strict=False):
    role = analysis.role_table(analysis.roles(run)).set_index("head")
    by_attention = role[["by attention", "attention share"]]
    if not roles or not by_attention.equals(roles[0]):  # the same in SAEs of one layer
        suffix = f" {ordinal}" if roles else ""
        roles.append(by_attention.add_suffix(suffix))
        config[f"attention share{suffix}"] = st.column_config.NumberColumn("share", format="percent", width=60)
    roles.append(role[["by DFA", "DFA share"]].add_suffix(f" {ordinal}"))
    config[f"by DFA {ordinal}"] = st.column_config.TextColumn(f"by DFA, {header}", help=name)
    config[f"DFA share {ordinal}"] = st.column_config.NumberColumn("share", format="percent", width=60)
st.dataframe(pd.concat(roles, axis=1).reset_index(), hide_index=True, column_config=config)

if len(chosen) > 1:
    st.subheader("Which features are the same", anchor=False)
    other = 1
    if len(chosen) > 2:
        options = ORDINALS[1 : len(chosen)]
        other = ORDINALS.index(
            st.segmented_control(
                "Match the first with the", options, default="second", required=True, key="against", bind="query-params"
            )
        )
    pair = [(each[0], each[other]) for each in (chosen, runs, short, charts.PALETTE)]
    matched.show(*pair, head, position)
