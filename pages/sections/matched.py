"""Two checkpoints feature by feature: pairs, features found only in one, and what dense features split into."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import streamlit as st

from analysis.match import read
from analysis.match.read import Match
from analysis.prompt.run import PromptRun
from pages.charts import compare as compare_charts
from pages.charts.common import PALETTE
from pages.shared import common
from trainer.checkpoint import Checkpoint, CheckpointError

_TABLE_ROWS = 1000  # sent to the browser of a table that shows all features


class Side(NamedTuple):
    """One of the compared checkpoints."""

    ordinal: str
    listed: Checkpoint
    short: str
    """its name without the words that all of them begin with"""
    colour: str
    """on the whole page"""

    @property
    def name(self) -> str:
        return self.listed.name

    @property
    def label(self) -> str:
        return f"{self.ordinal}: {self.name}"

    @property
    def dense(self) -> bool:
        return self.listed.is_dense


class View(NamedTuple):
    """A match, and what is to be seen of it: `a` and `b` are in the order of the match."""

    match: Match
    sides: list[Side]
    runs: list[PromptRun]
    head: int | None
    """only this head; None: all"""
    position: int | None
    """activations there; None: the largest on the prompt"""
    firing: bool
    """only features that fire there"""

    def of_head(self, table: pd.DataFrame) -> pd.DataFrame:
        return table if self.head is None else table[table["head"] == self.head]


def show(sides: list[Side], runs: list[PromptRun], head: int | None, position: int | None) -> None:
    """Draw the match of two checkpoints on one prompt: of a head (None: all), at a position (None: anywhere)."""
    ours, theirs = (side.listed.config.model for side in sides)
    if any(getattr(ours, key) != getattr(theirs, key) for key in ("fingerprint", "hook_layer", "processing")):
        st.info("Features of different models or layers cannot be matched.")
        return
    try:
        match = load(*(side.listed for side in sides))
        _ = match.pairs, match.features
    except CheckpointError as error:
        st.text(f"{error.reason}. This command matches their features:")
        paths = " ".join(common.shown_path(side.listed.path) for side in sides)
        st.code(f"python -m analysis.match {paths}", language="bash")
        return
    if match.a.path != sides[0].listed.path:  # the dense one comes first
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


@st.cache_resource(max_entries=12, show_spinner=False, hash_funcs={Checkpoint: common.version})
def _match(first: Checkpoint, second: Checkpoint, changed: tuple[float, ...]) -> Match:
    return Match(first, second)


def load(first: Checkpoint, second: Checkpoint) -> Match:
    """The match of two checkpoints, read once for all sessions, which must not change its frames.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    files = [read.match_folder(*each) / "meta.json" for each in ((first, second), (second, first))]
    return _match(first, second, tuple(map(common.modified, files)))


def _counts(match: Match, sides: list[Side]) -> None:
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
        found = {"both": "found in the other", "one": "only here"}
        frame = match.per_head().assign(
            name=lambda f: f["side"].map({key: side.short for key, side in zip("ab", sides, strict=True)}),
            found=lambda f: f["found"].map(found),
        )
        colours = {side.short: side.colour for side in sides}
        st.altair_chart(compare_charts.found_per_head(frame, colours, *found.values()))
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


def _pick(keys: list[str], table: str, chosen: str) -> None:
    """A click on a row of a table chooses it in the select box."""
    rows = st.session_state[table]["selection"]["rows"]
    if rows:
        st.session_state[chosen] = keys[rows[0]]


_FIGURES = {
    "head": st.column_config.NumberColumn(width=50),
    "cosine": st.column_config.NumberColumn(format="%.2f", width=60, help="of decoder rows, in the z of the head"),
    "jaccard": st.column_config.NumberColumn(
        format="%.2f", width=60, help="tokens on which both fire over tokens on which either does"
    ),
    "score": st.column_config.NumberColumn(format="%.2f", width=60),
    "activation": st.column_config.NumberColumn(format="%.3f"),
    "activation_a": st.column_config.NumberColumn("activation", format="%.3f"),
    "activation_b": st.column_config.NumberColumn("activation", format="%.3f"),
    "b_given_a": st.column_config.NumberColumn(
        "P(block | dense)", format="percent", help="share of the dense feature's firings on which the part fires"
    ),
    "a_given_b": st.column_config.NumberColumn(
        "P(dense | block)", format="percent", help="share of the part's firings on which the dense feature fires"
    ),
    "norm_share": st.column_config.NumberColumn(
        "decoder norm there", format="percent", help="share of the dense feature's squared decoder norm in that head"
    ),
    "covered": st.column_config.NumberColumn(
        format="percent", help="share of its summed activation on tokens where one of its parts fires"
    ),
    "chance": st.column_config.NumberColumn(
        "by chance", format="percent", help="share of all tokens where one of its parts fires"
    ),
}


def _pairs(view: View) -> None:
    """The table of pairs, and one of them along the prompt."""
    st.markdown("**Matched features**, head by head. Tick a row to draw its pair along the prompt.")
    table = view.of_head(read.aligned(view.match, *view.runs, view.position, view.firing))
    if table.empty:
        st.info("No pair fires here. Choose another token or head, or show also features that do not fire.")
        return
    shown = table.head(_TABLE_ROWS)
    keys = [f"{a} = {b}" for a, b in zip(shown["a"], shown["b"], strict=True)]
    st.dataframe(
        shown[["head", "a", "activation_a", "b", "activation_b", "cosine", "jaccard", "score"]],
        hide_index=True,
        height=300,
        key="pairs",
        on_select=lambda: _pick(keys, "pairs", "pair"),
        selection_mode="single-row",
        column_config=_FIGURES
        | {
            "a": st.column_config.NumberColumn(f"feature of {view.sides[0].short}"),
            "b": st.column_config.NumberColumn(f"feature of {view.sides[1].short}"),
        },
    )
    where = "at the chosen token" if view.position is not None else "the largest on the prompt"
    cut = f" The first {_TABLE_ROWS:,} of {len(table):,} pairs." if len(table) > len(shown) else ""
    st.caption(f"Activations: {where}, each in the units of its own SAE.{cut}")
    chosen = common.select(st, "Pair", keys, "pair")
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
        st.dataframe(
            table[["feature", "head", "activation", "parts", "covered", "chance", "firings"]].head(_TABLE_ROWS),
            hide_index=True,
            height=300,
            key="splits",
            on_select=lambda: _pick(keys, "splits", "dense"),
            selection_mode="single-row",
            column_config=_FIGURES | {"parts": st.column_config.NumberColumn(width=60)},
        )
    chosen = common.select(left, "Dense feature", keys, "dense")
    row = table.iloc[keys.index(chosen)]
    with right:
        st.altair_chart(compare_charts.norm_shares(row["norm_shares"].tolist(), dense.colour))
        st.caption(
            f"{row['covered']:.0%} of its activation falls on tokens where one of its {row['parts']} parts fires; "
            f"by chance it would be {row['chance']:.0%}."
        )
    parts = read.parts_of(view.match, int(chosen), block_run, view.position)
    columns = ["head", "b", "activation_b", "cosine", "b_given_a", "a_given_b", "norm_share", "score"]
    config = _FIGURES | {"b": st.column_config.NumberColumn("block feature")}
    st.dataframe(parts[columns], hide_index=True, column_config=config)
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
    config = _FIGURES | {
        "nearest": st.column_config.NumberColumn(width=70),
        "nearest_score": st.column_config.NumberColumn("its score", format="%.2f", width=70),
    }
    for column, key, side, run in zip(st.columns(2), "ab", view.sides, view.runs, strict=True):
        with column:
            table = view.of_head(read.only_in(view.match, key, run, view.position, view.firing))
            st.text(f"{'only in' if pair else 'in'} {side.short}: {len(table):,}")
            if len(table):
                order = ["head", "feature", "activation", "firings", *(["nearest", "nearest_score"] if pair else [])]
                st.dataframe(table[order].head(_TABLE_ROWS), hide_index=True, height=260, column_config=config)


def _along(lines: list[tuple[str, PromptRun, int]], colours: Sequence[str]) -> None:
    of_line = dict(zip([name for name, *_ in lines], colours, strict=False))
    st.altair_chart(compare_charts.over_tokens(read.over_tokens(lines), of_line))


def _links(features: list[tuple[Side, int]]) -> None:
    """To the dashboards of features."""
    with st.container(horizontal=True):
        for side, feature in features:
            plain = re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", side.short)  # labels are Markdown
            st.page_link(
                "pages/features.py",
                label=f"Feature {feature} of {plain}",
                icon=":material/arrow_forward:",
                query_params={"checkpoint": side.name, "feature": str(feature)},
            )
