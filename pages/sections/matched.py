"""Two checkpoints feature by feature: pairs, features found only in one, and what dense features split into."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import streamlit as st

from analysis.match import read
from analysis.match.read import Match
from analysis.prompt.run import PromptRun
from pages.charts import compare as charts
from pages.charts.common import PALETTE
from pages.sections.compared import ORDINALS, Shown
from pages.shared import live
from pages.shared.columns import draw_table
from pages.shared.page import feature_link, hint, plain
from pages.shared.pick import choose, pick_row, select
from pages.shared.words import in_words
from trainer.checkpoint import CheckpointError

_TABLE_ROWS = 1000  # sent to the browser of a table that shows all features


class View(NamedTuple):
    """A match, and what is to be seen of it: `a` and `b` are in the order of the match."""

    match: Match
    sides: list[Shown]
    runs: list[PromptRun]
    head: int | None
    """only this head; None: all"""
    position: int | None
    """activations there; None: the largest on the prompt"""
    firing: bool
    """only features that fire there"""

    def of_head(self, table: pd.DataFrame) -> pd.DataFrame:
        return table if self.head is None else table[table["head"] == self.head]


def show(shown: list[Shown], runs: list[PromptRun], head: int | None, position: int | None) -> None:
    """Draw the match of the first with another on one prompt: of a head (None: all), at a position (None: anywhere)."""
    other = ORDINALS[1]
    if len(shown) > 2:
        other = choose("Match the first with the", ORDINALS[1 : len(shown)], "against")
    pair = [0, ORDINALS.index(other)]
    sides, runs = [shown[i] for i in pair], [runs[i] for i in pair]
    first, second = (side.checkpoint for side in sides)
    if read.difference(first, second):
        st.info("Features of different models or layers cannot be matched.")
        return
    try:
        match = live.read_match(first, second)
    except CheckpointError as error:
        hint(error, "This command matches their features")
        return
    if match.a.path != first.path:  # the dense one comes first
        sides, runs = sides[::-1], runs[::-1]
    firing = st.toggle(
        "Only features that fire on the prompt", value=True, key="firing", bind="query-params",
        help="off: all features, also those that are silent here",
    )  # fmt: skip
    view = View(match, sides, runs, head, position, firing)
    _counts(match, sides)
    draw = _pairs if match.kind == "one-to-one" else _split
    draw(view)
    _alone(view)


def _counts(match: Match, sides: list[Shown]) -> None:
    """How much of each is in the other, in total and by head."""
    least, tokens = match.meta["min_firings"], match.meta["n_tokens"]
    judged = {side: len(match.of_side(side)) for side in "ab"}
    alone = {side: len(match.alone(side)) for side in "ab"}
    left, right = st.columns([2, 3])
    with left:
        pair = match.kind == "one-to-one"
        kinds = ("have a partner", "have a partner") if pair else ("split into block features", "are such a part")
        for key, side, kind in zip("ab", sides, kinds, strict=True):
            st.text(f"{judged[key] - alone[key]:,} of {judged[key]:,} features of {side.short} {kind}.")
        st.caption(_explanation(match))
    with right:
        words = {"both": "found in the other", "one": "only here"}
        frame = match.per_head().assign(
            name=lambda f: f["side"].map({key: side.short for key, side in zip("ab", sides, strict=True)}),
            found=lambda f: f["found"].map(words),
        )
        colours = {side.short: side.colour for side in sides}
        st.altair_chart(charts.found_per_head(frame, colours, *words.values()))
    st.caption(f"On {tokens:,} held-out tokens; features that fire on fewer than {least} of them are not judged.")


def _explanation(match: Match) -> str:
    if match.kind == "one-to-one":
        how = "greedily, the best score first" if match.meta["greedy"] else "so that the sum of scores is largest"
        return (
            f"Pairs are one-to-one within a head, chosen {how}. Score: √(decoder cosine · Jaccard index of firings), "
            f"at least {match.meta['threshold']}."
        )
    return (
        "Parts of a dense feature are the block features with √(cosine · co-firing) of at least "
        f"{match.meta['threshold']}. Cosine: of their decoder row with the dense row's slice in their head. Co-firing: "
        "√(P(block | dense) · P(dense | block)). A dense feature counts for the head with most of its decoder norm."
    )


_COSINE = {"cosine": {"help": "of decoder rows, in the z of the head"}}


def _pairs(view: View) -> None:
    """The table of pairs, and one of them along the prompt."""
    st.markdown("**Matched features**, head by head. Tick a row to draw its pair along the prompt.")
    table = view.of_head(read.aligned(view.match, *view.runs, view.position, view.firing))
    if table.empty:
        st.info("No pair fires here. Choose another token or head, or show also features that do not fire.")
        return
    shown = table.head(_TABLE_ROWS)
    keys = [f"{a} = {b}" for a, b in zip(shown["a"], shown["b"], strict=True)]
    columns = ["head", "a", "activation_a", "b", "activation_b", "cosine", "jaccard", "score"]
    titles = {key: f"feature of {side.short}" for key, side in zip("ab", view.sides, strict=True)}
    draw_table(shown[columns], {**_COSINE, **titles}, height=300, **pick_row("pairs", "pair", keys))
    where = "at the chosen token" if view.position is not None else "the largest on the prompt"
    cut = f" The first {_TABLE_ROWS:,} of {len(table):,} pairs." if len(table) > len(shown) else ""
    st.caption(f"Activations: {where}, each in the units of its own SAE.{cut}")
    chosen = select(st, "Pair", keys, "pair")
    row = shown.iloc[keys.index(chosen)]
    features = list(zip(view.sides, (int(row["a"]), int(row["b"])), strict=True))
    lines = [(f"{side.short}: {f}", run, f) for run, (side, f) in zip(view.runs, features, strict=True)]
    _along(lines, [side.colour for side in view.sides])
    _links(features)


def _split(view: View) -> None:
    """Dense features with their parts: all of them, then one along the prompt."""
    st.markdown("**What dense features split into.** Tick a row to see its parts.")
    (dense, block), (dense_run, block_run) = view.sides, view.runs
    table = view.of_head(read.split_on(view.match, dense_run, view.position, view.firing))
    if table.empty:
        st.info("No dense feature with parts fires here. Choose another token or head, or show also silent ones.")
        return
    keys = [str(feature) for feature in table["feature"]]
    left, right = st.columns([3, 2])
    with left:
        columns = ["feature", "head", "activation", "parts", "covered", "chance", "firings"]
        draw_table(table[columns].head(_TABLE_ROWS), height=300, **pick_row("splits", "dense", keys))
    chosen = select(left, "Dense feature", keys, "dense")
    row = table.iloc[keys.index(chosen)]
    with right:
        st.altair_chart(charts.norm_shares(row["norm_shares"].tolist(), dense.colour))
        st.caption(
            f"{row['covered']:.0%} of its activation falls on tokens where one of its {row['parts']} parts fires; "
            f"by chance it would be {row['chance']:.0%}."
        )
    parts = read.parts_of(view.match, int(chosen), block_run, view.position)
    columns = ["head", "b", "activation_b", "cosine", "b_given_a", "a_given_b", "norm_share", "score"]
    draw_table(parts[columns], {**_COSINE, "b": "block feature"})
    lines = [(f"{dense.short}: {chosen}", dense_run, int(chosen))]
    lines += [(f"head {h}: {b}", block_run, int(b)) for h, b in zip(parts["head"], parts["b"], strict=True)]
    colours = [dense.colour, block.colour]
    _along(lines, [*colours, *(colour for colour in PALETTE if colour not in colours)])
    _links([(dense, int(chosen)), *((block, int(b)) for b in parts["b"])])


def _alone(view: View) -> None:
    """Features found only in one, of either side."""
    pair = view.match.kind == "one-to-one"
    st.markdown("**Found only in one**" if pair else "**Without a counterpart**")
    if pair:
        st.caption(
            "`nearest` is the feature of the other that comes closest; where its score would do, a closer feature "
            "has it for a partner."
        )
    for column, key, side, run in zip(st.columns(2), "ab", view.sides, view.runs, strict=True):
        with column:
            table = view.of_head(read.only_in(view.match, key, run, view.position, view.firing))
            st.text(f"{'only in' if pair else 'in'} {side.short}: {len(table):,}")
            if len(table):
                order = ["head", "feature", "activation", "firings", *(["nearest", "nearest_score"] if pair else [])]
                draw_table(table[order].head(_TABLE_ROWS), height=260)


def _along(lines: list[tuple[str, PromptRun, int]], colours: Sequence[str]) -> None:
    of_line = dict(zip([name for name, *_ in lines], colours, strict=False))
    st.altair_chart(charts.over_tokens(read.over_tokens(lines), of_line))


def _links(features: list[tuple[Shown, int]]) -> None:
    """To the dashboards of features, with what is known of them in words."""
    with st.container(horizontal=True):
        for side, feature in features:
            feature_link(side.checkpoint, feature, f"Feature {feature} of {plain(side.short)}")
    for side, feature in features:
        if said := in_words(side.checkpoint, [feature])[0]:
            st.text(f"{side.short} {feature}: {said}")
