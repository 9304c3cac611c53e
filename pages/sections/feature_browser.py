"""Filters over all features of a checkpoint, and a list of those that fit, ranked."""

from functools import partial
from typing import Any

import pandas as pd
import streamlit as st

from analysis.attribution import SLOTS
from analysis.lists import Lists
from analysis.prompt.run import firing
from analysis.search import Tokens
from analysis.store import Analysis, Order
from analysis.tokens import TOKEN_CLASSES
from pages.components.listing import listing
from pages.shared import live
from pages.shared.page import refuse
from pages.shared.pick import ALL, number, pick_head, put
from pages.shared.words import in_words, written
from trainer.checkpoint import Checkpoint

_PER_PAGE = 200
_REMEMBERED = 15  # features seen
_FIRES, _READS = "Fires on", "Reads token"
_CLASSES = [f"any {name}" for name in TOKEN_CLASSES]
_HOW = (
    'A word (case and white space around it do not matter), a class from the list, `" of"` in double quotes for '
    "exactly that token, or a regular expression between slashes: `/^ \\d+$/`."
)
_USUAL = "as searched, else most firings"
# By a column of what `Analysis.search` returns, and whether the smallest comes first; None: as it ranks.
_ORDERS: dict[str, tuple[str, bool] | None] = {
    _USUAL: None,
    "most firings": ("firings", False),
    "fewest firings": ("firings", True),
    "largest activation": ("max_activation", False),
    "clearest source slot": ("role_share", False),
    "best described": ("description_auroc", False),
    "id": ("feature", True),
}
_RANKED: dict[str, tuple[str, Order]] = {  # by the lower end of an interval, where something was searched for
    "share of its firings": (_FIRES, "precision"),
    "share of the token's places": (_FIRES, "recall"),
    "share of its reads": (_READS, "read_precision"),
}
_FOUND = ("precision", "recall", "read_precision", "examples")


def pick_fitting(checkpoint: Checkpoint, analysis: Analysis) -> pd.DataFrame:
    """Filters, and the features that fit, in order: rows as of `Analysis.search`.

    Raises:
        CheckpointError: an artefact is damaged.
    """
    bound: dict[str, Any] = {"bind": "query-params", "on_change": put, "args": ("page", 1)}  # begin on the first page
    token: dict[str, Any] = {"accept_new_options": True, "placeholder": "a token or a class", "help": _HOW, **bound}
    counted = token if analysis.has("counts") else {**token, "disabled": True, "placeholder": "not in a summary"}
    first, second, third = st.columns([3, 3, 2])
    fires = first.selectbox(_FIRES, _CLASSES, None, key="fires", **counted)
    reads = second.selectbox(_READS, _CLASSES, None, key="reads", **counted)
    head = pick_head(checkpoint.n_heads, column=third, on_change=put, args=("page", 1))
    left, right = st.columns([2, 3], vertical_alignment="bottom")
    with left.popover("More filters", width="stretch"):
        promotes = st.selectbox("Promotes", _CLASSES, None, key="promotes", **token)
        listed = _pick_list(checkpoint, bound)
        largest = "the source slot with the largest share of its positive DFA on text"
        role = st.selectbox("Reads from", [ALL, *SLOTS], key="role", help=largest, **bound)
        prompt = st.text_input("A prompt on which it fires", key="mine", **bound)
        near = st.text_input("Words near a firing in its examples", key="near", **bound)
        noted = st.text_input("Words of its label, note or description", key="noted", **bound)
        steps = [0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]
        density = st.select_slider("Density: share of tokens on which it fires", steps, (0, 1), key="density", **bound)
    given = {_FIRES: fires, _READS: reads}
    ranked = {name: order for name, (needs, order) in _RANKED.items() if given[needs]}
    options = [*(name for name, by in _ORDERS.items() if by is None or by[0] in analysis.features), *ranked]
    if st.session_state.get("order", _USUAL) not in options:
        put("order", _USUAL)
    by = right.selectbox("Order", options, key="order", **bound)
    try:
        fitting = analysis.search(
            fires_on=Tokens.typed(fires) if fires else None,
            reads=Tokens.typed(reads) if reads else None,
            promotes=Tokens.typed(promotes) if promotes else None,
            role=None if role == ALL else role,
            head=head,
            density=density,
            in_examples=near or None,
            in_text=noted or None,
            labels=written(checkpoint).reset_index() if noted else None,
            order=ranked.get(by),
        )
    except ValueError as error:  # what was typed is no regular expression
        refuse(error)
        st.stop()
    if prompt:
        fitting = fitting[fitting["feature"].isin(firing(live.run_prompt(checkpoint, prompt)))]
    if listed is not None:
        fitting = fitting[fitting["feature"].isin(listed)]
    if column := _ORDERS.get(by):
        fitting = fitting.sort_values(column[0], ascending=column[1], kind="stable", na_position="last")
    return fitting


def _pick_list(checkpoint: Checkpoint, bound: dict[str, Any]) -> list[int] | None:
    """The features of a list; None where none is picked, or there is none."""
    try:
        lists = Lists(checkpoint.path).all()
    except ValueError as error:
        refuse(error)
        return None
    names = sorted(lists)
    if st.session_state.get("list") not in (None, *names):  # of another checkpoint
        put("list", None)
    name = st.selectbox("On the list", names, None, key="list", placeholder="any or none", **bound)
    return lists[name] if name else None


def pick_feature(analysis: Analysis, order: list[int]) -> int:
    """The feature shown, by default the first of `order`, and steps to others."""
    d_sae = len(analysis.features)
    if (st.session_state.get("feature") or 0) >= d_sae:  # of another checkpoint
        put("feature", None)
    first = order[0] if order else 0
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        chosen = number(st, "Feature", 0, d_sae - 1, None, key="feature", width=120, placeholder=str(first))
        feature = first if chosen is None else int(chosen)
        head = analysis.features["head"]
        place = order.index(feature) if feature in order else None
        steps = {"Previous": -1, "Next": 1}
        for name, step in steps.items():
            at = max(0, step - 1) if place is None else place + step  # what is filtered away comes before the first
            target = order[at] if 0 <= at < len(order) and (place is not None or step > 0) else None
            _go(name, target, "of the features below, in their order")
        for name, step in steps.items():
            of_head = head[(head == head[feature] + step) & (analysis.features["firings"] > 0)]
            _go(f"{name} head", int(of_head.index[0]) if len(of_head) else None, "its first feature that fires")
        _draw_history(str(analysis.folder), feature)
    return feature


def _draw_history(of: str, feature: int) -> None:
    """What was looked at before in this session `of` an analysis, the last first."""
    visited = st.session_state.setdefault("visited", {}).setdefault(of, [])
    if visited[:1] != [feature]:
        visited[:] = [feature, *(each for each in visited if each != feature)][:_REMEMBERED]
    with st.popover("Seen", help="features looked at before"):
        for each in visited[1:]:
            st.button(str(each), key=f"seen_{each}", on_click=put, args=("feature", each), type="tertiary")


def show(checkpoint: Checkpoint, analysis: Analysis, fitting: pd.DataFrame, feature: int) -> list[int]:
    """A page of the features that fit, of which one is chosen; returns their ids."""
    if fitting.empty:
        st.info("No feature fits: loosen a filter.")
        return []
    n_pages = -(-len(fitting) // _PER_PAGE)
    if st.session_state.get("page", 1) > n_pages:
        put("page", 1)
    left, right = st.columns([3, 1], vertical_alignment="center")
    alive, n_tokens = int((analysis.features["firings"] > 0).sum()), analysis.meta["n_tokens"]
    left.caption(
        f"{len(fitting):,} of {alive:,} features that fire on the {n_tokens:,} tokens analysed "
        f"({len(analysis.features):,} in all){f', page of {n_pages}:' if n_pages > 1 else '.'}"
    )
    page = 1
    if n_pages > 1:
        page = number(right, f"Page of {n_pages}", 1, n_pages, key="page", label_visibility="collapsed")
    shown = fitting.iloc[(page - 1) * _PER_PAGE : page * _PER_PAGE]
    found = [name for name in _FOUND if name in shown]
    columns = ["feature", "head", *(found or ["density"])]
    rows = shown[columns].assign(words=in_words(checkpoint, shown["feature"]))
    pick = partial(put, "feature")
    listing(rows, "feature", feature, pick, "browser", search=_FIRES, to_top=True, height=380)
    return shown["feature"].tolist()


def _go(name: str, target: int | None, what: str) -> None:
    st.button(
        name,
        key=f"go_{name}",
        disabled=target is None,
        help=what,
        on_click=put,
        args=("feature", target),
        type="tertiary",
    )
