"""The features that fire on a prompt: where in a map, which in a table, and from where one of them reads."""

from typing import Any

import pandas as pd
import streamlit as st

from analysis.prompt.run import PromptRun, active_features, firing_map, source_attribution
from pages.charts import prompt as charts
from pages.shared import live
from pages.shared.columns import draw_table
from pages.shared.page import feature_link
from pages.shared.pick import ALL, pick_head, pick_row, put, select
from trainer.checkpoint import Checkpoint

RANKS = ("activation", "direct effect on a next token", "DFA from a source")
_WIDEST = 96  # tokens of the map that can be read side by side
_SOURCES = 60  # bars that can be read side by side


def tokens(run: PromptRun) -> list[str]:
    """Every token but BOS, as select boxes name it: the position of one is 1 + its index."""
    return [run.label(position) for position in range(1, len(run.strings))]


def pick_place(run: PromptRun) -> tuple[int | None, tuple[int, int] | None]:
    """The head, and the first and last position; None for all."""
    left, middle, right = st.columns(3)
    head = pick_head(0 if run.dense else len(run.pattern), column=left)
    labels = tokens(run)
    token = select(middle, "Token", [ALL, *labels], "token")
    span = None
    if token != ALL:
        first = labels.index(token)
        until = select(right, "to token", labels[first:], "until")
        span = (1 + first, 1 + labels.index(until))
    return head, span


def rank_firings(
    checkpoint: Checkpoint, prompt: str, run: PromptRun, head: int | None, span: tuple[int, int] | None
) -> pd.DataFrame:
    """The features that fire in the head and at the tokens picked, as ranked."""
    return active_features(run, head, span, **_pick_rank(checkpoint, prompt, run, span))


def pick_firing(checkpoint: Checkpoint, run: PromptRun, firings: pd.DataFrame) -> pd.Series | None:
    """The table of features that fire, and one of them with what it reads; None where none fires."""
    if firings.empty:
        st.info("No feature fires here. Pick another head or token, or a checkpoint with a higher L0.")
        return None
    names = [f"{f}@{p}" for f, p in zip(firings["feature"], firings["position"], strict=True)]
    draw_table(firings, {"head": None} if run.dense else None, height=300, **pick_row("table", "firing", names))
    st.subheader("Where a feature reads from", anchor=False)
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    firing = firings.iloc[names.index(select(left, "Feature @ position", names, "firing"))]
    feature = int(firing["feature"])
    if (checkpoint.path / "analysis" / "meta.json").exists():
        feature_link(checkpoint, feature, "Its dashboard", right)
    sources = source_attribution(run, int(firing["head"]), feature % run.features_per_block, int(firing["position"]))
    if len(sources) > _SOURCES:
        st.caption(f"The {_SOURCES} sources with the largest |DFA| of {len(sources)}, in order.")
        sources = sources.reindex(sources["dfa"].abs().nlargest(_SOURCES).index).sort_index()
    owner = "of all heads" if run.dense else f"of head {firing['head']}"
    st.text(
        f"Feature {feature} {owner} at {firing['token']} "
        f"fires with {firing['activation']:.3f}; its largest source is {firing['reads from']} ({firing['slot']})."
    )
    st.altair_chart(charts.source_strips(sources))
    return firing


def draw_map(run: PromptRun) -> None:
    """Counts of features by head and token; a click on a cell picks its head and token, one beside them all."""
    st.subheader("How many features fire", anchor=False)

    def clicked() -> None:
        cells = st.session_state["map"]["selection"]["cell"]
        put("head", str(cells[0]["head"]) if cells else ALL)
        put("token", run.label(cells[0]["position"]) if cells else ALL)

    counts, length = firing_map(run), len(run.strings)
    largest = int(counts["active"].max())
    if length > _WIDEST:
        last = length - _WIDEST
        first = st.slider("Tokens shown, from", 1, last, last, key="from", bind="query-params")
        counts = counts[counts["position"].between(first, first + _WIDEST)]
    chart = charts.firing_map(counts, largest)
    st.altair_chart(chart, width="stretch", key="map", on_select=clicked, selection_mode="cell")


def _pick_rank(checkpoint: Checkpoint, prompt: str, run: PromptRun, span: tuple[int, int] | None) -> dict[str, Any]:
    """By what features are ranked, as `active_features` takes it."""
    left, right = st.columns(2, vertical_alignment="bottom")
    rank = left.selectbox("Rank by", RANKS, key="rank", bind="query-params")
    if rank == RANKS[2]:
        labels = [run.label(0), *tokens(run)]
        return {"source": labels.index(select(right, "Source", labels, "source"))}
    if rank == RANKS[1]:
        last = span[1] if span else len(run.strings) - 1
        predicted = live.ablation(checkpoint, prompt, "layer by reconstruction", 0, last)
        names = [f"{token} ({number})" for token, number in zip(predicted["token"], predicted["id"], strict=True)]
        wanted = names.index(select(right, "Next token", names, "next"))
        st.caption("What each firing adds to that token's logit at its own position, by the direct path alone.")
        return {"effect": live.direct_effects(checkpoint, prompt, int(predicted["id"].iloc[wanted]))}
    return {}
