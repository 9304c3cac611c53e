"""Filters over all features of a checkpoint, and a table of those that fit."""

from typing import Any

import pandas as pd
import streamlit as st

from analysis.attribution import SLOTS
from analysis.labels import Labels
from analysis.store import Analysis
from pages.shared.columns import draw_table
from pages.shared.page import refuse
from pages.shared.pick import ALL, number, pick_head, pick_row, put
from trainer.checkpoint import Checkpoint

_PER_PAGE = 200
_SORTS = {
    "most frequent first": ("firings", False),
    "rarest first": ("firings", True),
    "strongest first": ("max_activation", False),
    "clearest role first": ("role_share", False),
    "by id": ("feature", True),
}
_TOKENS = {
    "fires": ("Fires on", "fires on most"),
    "reads": ("Reads token", "reads most, by DFA"),
    "promotes": ("Promotes", "promotes most, by its direct effect on the logits"),
}


def show(checkpoint: Checkpoint, analysis: Analysis, labels: Labels) -> tuple[list[int], list[int]]:
    """Draw filters and table; returns the ids of the features that fit, in order, and of those on the page shown.

    Raises:
        CheckpointError: an artefact is damaged.
    """
    bound: dict[str, Any] = {"bind": "query-params", "on_change": put, "args": ("page", 1)}  # begin on the first page
    columns = st.columns([1, 1.4, 1.6, 1.6, 1.6, 1.6])
    head = pick_head(checkpoint.n_heads, column=columns[0], on_change=put, args=("page", 1))
    largest = "the source slot with the largest share of its positive DFA on text"
    role = columns[1].selectbox("Reads from", [ALL, *SLOTS], key="role", help=largest, **bound)
    texts = {
        key: column.text_input(
            name, key=key, placeholder="a token, as text", **bound,
            help=f"one of the ten tokens that the feature {what}; case and white space around it do not matter",
        )
        for column, (key, (name, what)) in zip(columns[2:5], _TOKENS.items(), strict=True)
    }  # fmt: skip
    noted = columns[5].text_input("Label contains", key="noted", placeholder="in your labels and notes", **bound)
    left, middle, right = st.columns([3, 2, 1], vertical_alignment="bottom")
    steps = [0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]
    density = left.select_slider(
        "Density (share of tokens on which it fires)", steps, value=(0, 1), key="density", **bound
    )
    by, ascending = _SORTS[middle.selectbox("Order", list(_SORTS), key="order", **bound)]

    fitting = analysis.search(
        fires_on=texts["fires"],
        reads=texts["reads"],
        promotes=texts["promotes"],
        role=None if role == ALL else role,
        head=head,
        density=density,
    )
    written = _written(labels)
    if noted:
        text = (written["label"] + " " + written["note"]).str.lower()
        fitting = fitting[fitting["feature"].isin(text.index[text.str.contains(noted.lower(), regex=False)])]
    fitting = fitting.sort_values(by, ascending=ascending, kind="stable", na_position="last")
    n_pages = max(1, -(-len(fitting) // _PER_PAGE))
    if st.session_state.get("page", 1) > n_pages:
        put("page", 1)
    page = number(right, f"Page of {n_pages}", 1, n_pages, key="page")
    alive = int((analysis.features["firings"] > 0).sum())
    st.caption(
        f"{len(fitting):,} of {alive:,} features that fire on the {analysis.meta['n_tokens']:,} tokens analysed "
        f"({len(analysis.features):,} in all)."
    )
    shown = fitting.iloc[(page - 1) * _PER_PAGE : page * _PER_PAGE]
    ids = shown["feature"].tolist()
    if fitting.empty:
        st.info("No feature fits: loosen a filter.")
    else:
        table = shown[["feature", "head", "density", "max_activation", "role", "role_share", "description"]]
        table = table.assign(label=table["feature"].map(written["label"]).fillna(""))
        draw_table(table, height=280, **pick_row("browser", "feature", ids))
    return fitting["feature"].tolist(), ids


def _written(labels: Labels) -> pd.DataFrame:
    """Labels and notes by feature; none, with a sentence, where their file is damaged."""
    try:
        return labels.table().set_index("feature")
    except ValueError as error:
        refuse(error)
        return pd.DataFrame(columns=["label", "note"])
