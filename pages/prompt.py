"""A prompt through one checkpoint: what fires, where it reads from, and what happens without it."""

from functools import partial

import streamlit as st

from analysis.prompt import run as analysis
from pages.charts import common as charts
from pages.shared import common, live

ALL = "all"
RANKS = ("activation", "direct effect on a next token", "DFA from a source")
WIDEST = 96  # tokens of the map that can be read side by side

common.begin(
    "Prompt",
    "Type a prompt: the map counts the features that fire in each head at each token. Click a cell or pick a head and "
    "a token, then a feature, to see which earlier tokens it reads from and what changes without it.",
)

listed = common.pick_checkpoint(common.readable(), "Checkpoint", "checkpoint")
prompt = live.prompt_box()
run = live.prompt_run(listed, prompt)
length = len(run.strings)
tokens = [run.label(position) for position in range(1, length)]


def pick_cell() -> None:
    """A click on the map chooses its head and token."""
    cells = st.session_state["map"]["selection"]["cell"]
    st.session_state["head"] = str(cells[0]["head"]) if cells else ALL
    st.session_state["token"] = run.label(cells[0]["position"]) if cells else ALL


def pick_row(names: list[str]) -> None:
    """A click on the table chooses its feature."""
    rows = st.session_state["table"]["selection"]["rows"]
    if rows:
        st.session_state["firing"] = names[rows[0]]


st.subheader("Features that fire", anchor=False)
counts = analysis.firing_map(run)
largest = int(counts["active"].max())
if length > WIDEST:
    first = st.slider("Tokens shown, from", 1, length - WIDEST, length - WIDEST, key="from", bind="query-params")
    counts = counts[counts["position"].between(first, first + WIDEST)]
st.altair_chart(
    charts.firing_map(counts, largest), width="stretch", key="map", on_select=pick_cell, selection_mode="cell"
)
left, middle, right = st.columns(3)
heads = [ALL, *map(str, range(0 if run.dense else len(run.pattern)))]
head = common.select(left, "Head", heads, "head")
token = common.select(middle, "Token", [ALL, *tokens], "token")
position = None if token == ALL else 1 + tokens.index(token)
span = None
if position is not None:
    until = common.select(right, "to token", tokens[position - 1 :], "until")
    span = (position, 1 + tokens.index(until))

left, right = st.columns([2, 2], vertical_alignment="bottom")
rank = left.selectbox("Rank by", RANKS, key="rank", bind="query-params")
block = None if head == ALL else int(head)
choice: dict = {}
if rank == RANKS[2]:
    source = common.select(right, "Source", [run.label(0), *tokens], "source")
    choice = {"source": [run.label(0), *tokens].index(source)}
elif rank == RANKS[1]:
    predicted = live.predictions(listed, prompt, (span[1] if span else length - 1))
    names = [f"{row.token} ({row.id})" for row in predicted.itertuples()]
    wanted = common.select(right, "Next token", names, "next")
    choice = {"effect": live.direct_effects_on(listed, prompt, int(predicted["id"].iloc[names.index(wanted)]))}
    st.caption("What each firing adds to that token's logit at its own position, by the direct path alone.")

features = analysis.active_features(run, block, span, **choice)
chosen = None
if features.empty:
    st.info("No feature fires here. Pick another head or token, or a checkpoint with a higher L0.")
else:
    names = [f"{f}@{p}" for f, p in zip(features["feature"], features["position"], strict=True)]
    st.dataframe(
        features,
        hide_index=True,
        width="stretch",
        height=300,
        key="table",
        on_select=partial(pick_row, names),
        selection_mode="single-row",
        column_config={
            "head": None if run.dense else st.column_config.NumberColumn(),
            "share": st.column_config.ProgressColumn("share of the head", format="percent", min_value=0, max_value=1),
            "source share": st.column_config.NumberColumn("share of its DFA", format="percent"),
            "activation": st.column_config.NumberColumn(format="%.3f"),
            "effect": st.column_config.NumberColumn("effect on the logit", format="%.4f"),
            "from source": st.column_config.NumberColumn("DFA from it", format="%.3f"),
        },
    )
    st.subheader("Where a feature reads from", anchor=False)
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    chosen = common.select(left, "Feature @ position", names, "firing")
    row = features.iloc[names.index(chosen)]
    common.feature_link(right, listed, int(row["feature"]))
    sources = analysis.source_attribution(
        run, int(row["head"]), int(row["feature"]) % run.features_per_block, int(row["position"])
    )
    if len(sources) > 60:
        strongest = sources.reindex(sources["dfa"].abs().nlargest(60).index).sort_index()
        st.caption(f"The 60 sources with the largest |DFA| of {len(sources)}, in order.")
        sources = strongest
    owner = "of all heads" if run.dense else f"of head {row['head']}"
    st.text(
        f"Feature {row['feature']} {owner} at {row['token']} "
        f"fires with {row['activation']:.3f}; its largest source is {row['reads from']} ({row['slot']})."
    )
    st.altair_chart(charts.source_strips(sources))

st.subheader("What changes without it", anchor=False)
n_heads = len(run.pattern)
wheres = {
    "the feature chosen above": ("feature", None),
    "all features of a head": ("features of head", n_heads),
    "a head, by its reconstruction": ("head by reconstruction", n_heads),
    "the whole layer, by its reconstruction": ("layer by reconstruction", None),
}
left, middle, right = st.columns(3)
what = left.selectbox("Take away or replace", list(wheres), key="ablate", bind="query-params")
kind, numbers = wheres[what]
which = 0
if numbers:
    which = middle.selectbox("Which head", list(range(numbers)), key="which", bind="query-params")
usual = "where the feature fires" if kind == "feature" else "the last token"
at = common.select(right, "Predict after token", [usual, *tokens], "predict")
if kind == "feature" and chosen is None:
    st.caption("Pick a feature above first.")
else:
    if kind == "feature":
        which = int(row["feature"])
    st.caption(
        "At every position but BOS. p: the probability as it is. Direct: everything else frozen, the final norm's "
        "scale too. Full: the rest of the model run again. Changes are of the logit and of log p (nats)."
    )
    after = 1 + tokens.index(at) if at != usual else length - 1
    if at == usual and kind == "feature":
        after = int(row["position"])
    changed = live.ablation(listed, prompt, kind, which, after)
    best = changed.iloc[0]
    st.text(
        f"After {run.label(after)}: {best['token']} {best['probability']:.1%} as it is, "
        f"{best['full probability']:.1%} without (full), "
        f"{best['direct probability']:.1%} by the direct path alone"
    )
    st.dataframe(
        changed,
        hide_index=True,
        height=320,
        column_config={
            "id": None,
            "probability": st.column_config.NumberColumn("p", format="percent"),
            **{
                f"{way} {name}": st.column_config.NumberColumn(f"{way}: {short}", format=form)
                for way in ("direct", "full")
                for name, short, form in (
                    ("probability", "p", "percent"),
                    ("logit change", "\u0394 logit", "%+.4f"),
                    ("log-probability change", "\u0394 log p", "%+.4f"),
                )
            },
        },
    )

st.subheader("What each head does on this prompt", anchor=False)
st.caption(
    "Shares over all destinations but BOS. Upper bar, attention: where the head looks. Lower bar, DFA: what the "
    "features that fire read. Slots are exclusive; the first that applies counts: bos, self, induction (after an "
    "earlier copy of this token), duplicate (an earlier copy), previous, local (2 to 5 back), other."
)
shares = analysis.roles(run)
left, right = st.columns([3, 2])
left.altair_chart(charts.roles(shares))
with right:
    live.show_role_table(shares)
