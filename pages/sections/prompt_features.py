"""The features that fire on a prompt, one row each; where in a map; and from where one of them reads."""

from typing import Any

import pandas as pd
import streamlit as st

from analysis.prompt.intervene import Intervention
from analysis.prompt.run import PromptRun, active_features, firing_map, source_attribution
from pages.charts import prompt as charts
from pages.components.listing import listing
from pages.shared import live
from pages.shared.address import permalink
from pages.shared.page import feature_link
from pages.shared.pick import ALL, pick_head, put, select
from pages.shared.words import in_words
from trainer.checkpoint import Checkpoint

RANKS = ("activation", "direct effect on a next token", "DFA from a source")
CHOSEN = ("token", "until", "source", "next", "firing")  # here, which means nothing on another prompt
EXPLORE = "explore"  # the part of the page that shows what is chosen
_PER_HEAD, _OF_ONE = 40, 300  # features listed
_WIDEST = 96  # tokens of the map that can be read side by side
_SOURCES = 60  # bars that can be read side by side


def tokens(run: PromptRun) -> list[str]:
    """Every token but BOS, as select boxes name it: the position of one is 1 + its index."""
    return run.labels[1:]


def pick(
    checkpoint: Checkpoint, prompt: str, run: PromptRun
) -> tuple[int | None, tuple[int, int] | None, pd.DataFrame, pd.Series | None]:
    """The head, the first and last position (None: all), the features that fire there as ranked, and one of them.

    By default it is the first; None where none fires.
    """
    of_head, of_token, to_token, by, of_rank, feature = st.columns([1, 2, 2, 2, 2, 1.5])
    head = pick_head(0 if run.dense else len(run.pattern), column=of_head)
    labels, span = tokens(run), None
    token = select(of_token, "Token", [ALL, *labels], "token")
    if token != ALL:
        first = labels.index(token)
        until = select(to_token, "to token", labels[first:], "until")
        span = (1 + first, 1 + labels.index(until))
    rank = by.selectbox("Rank by", RANKS, key="rank", bind="query-params")
    how: dict[str, Any] = {}
    if rank == RANKS[2]:
        sources = [run.labels[0], *labels]
        how = {"source": sources.index(select(of_rank, "Source", sources, "source"))}
    elif rank == RANKS[1]:
        last = span[1] if span else len(labels)
        effect = live.effect(checkpoint, prompt, Intervention("layer by reconstruction"), last)
        predicted = live.next_tokens(checkpoint, effect)
        names = [f"{token} ({number})" for token, number in zip(predicted["token"], predicted["id"], strict=True)]
        what = "what each firing adds to that token's logit at its own position, by the direct path alone"
        wanted = names.index(select(of_rank, "Next token", names, "next", help=what))
        how = {"effect": live.direct_effects(checkpoint, prompt, int(predicted["id"].iloc[wanted]))}
    limit = _OF_ONE if run.dense or head is not None else _PER_HEAD
    features = active_features(run, head, span, limit, **how)
    if features.empty:
        return head, span, features, None
    names = features["feature"].astype(str).tolist()
    return head, span, features, features.iloc[names.index(select(feature, "Feature", names, "firing"))]


def show(checkpoint: Checkpoint, run: PromptRun, features: pd.DataFrame, chosen: pd.Series | None) -> None:
    """The list of features, grouped by head."""
    if chosen is None:
        st.info("No feature fires here. Pick another head or token, or a checkpoint with a higher L0.")
        return
    read = [f"{token} ({slot})" for token, slot in zip(features["reads from"], features["slot"], strict=True)]
    ranked = [name for name in ("effect", "from source") if name in features]
    rows = features[["feature", "head", "along", *ranked, "activation", "share"]].assign(
        **{"from": read, "words": in_words(checkpoint, features["feature"])}
    )
    listing(
        rows,
        "feature",
        int(chosen["feature"]),
        lambda feature: put("firing", str(feature)),
        "features",
        group=None if run.dense else "head",
        tokens=run.strings,
        search="Feature",
        height=560,
        **{"head": None} if run.dense else {},
    )


def show_sources(checkpoint: Checkpoint, run: PromptRun, firing: pd.Series) -> None:
    """Where the chosen feature reads from, where it fires strongest.

    Args:
        firing: a row of `active_features`.
    """
    feature, head, position = (int(firing[name]) for name in ("feature", "head", "position"))
    owner = "of all heads" if run.dense else f"of head {head}"
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    left.markdown(f"**Where feature {feature} reads from**")
    if (checkpoint.path / "analysis" / "meta.json").exists():
        feature_link(checkpoint, feature, "Its dashboard", right)
    if said := in_words(checkpoint, [feature])[0]:
        st.caption(said)
    sources = source_attribution(run, head, feature % run.features_per_block, position)
    if len(sources) > _SOURCES:
        st.caption(f"The {_SOURCES} sources with the largest |DFA| of {len(sources)}, in order.")
        sources = sources.reindex(sources["dfa"].abs().nlargest(_SOURCES).index).sort_index()
    st.text(
        f"Feature {feature} {owner} at {firing['token']} "
        f"fires with {firing['activation']:.3f}; its largest source is {firing['reads from']} ({firing['slot']})."
    )
    st.altair_chart(charts.source_strips(sources))


@st.fragment
@permalink()
def draw_map(run: PromptRun) -> None:
    """Counts of features by head and token; a click on a cell picks its head and token, one beside them all."""
    st.subheader("How many features fire", anchor=False)

    def clicked() -> None:
        cells = st.session_state["map"]["selection"]["cell"]
        put("head", str(cells[0]["head"]) if cells else ALL)
        put("token", run.labels[cells[0]["position"]] if cells else ALL)
        st.rerun(EXPLORE)

    counts, length = firing_map(run), len(run.strings)
    largest = int(counts["active"].max())
    if length > _WIDEST:
        last = length - _WIDEST
        first = st.slider("Tokens shown, from", 1, last, last, key="from", bind="query-params")
        counts = counts[counts["position"].between(first, first + _WIDEST)]
    chart = charts.firing_map(counts, largest)
    st.altair_chart(chart, width="stretch", key="map", on_select=clicked, selection_mode="cell")
