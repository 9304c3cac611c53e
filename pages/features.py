"""Every feature of a checkpoint: a browser over all of them, and the dashboard of one."""

import pandas as pd
import streamlit as st

from analysis.attribution import SLOTS
from analysis.labels import Labels
from pages.sections import dashboard
from pages.shared import common

ALL = "all"
PER_PAGE = 200
SORTS = {
    "most frequent first": ("firings", False),
    "rarest first": ("firings", True),
    "strongest first": ("max_activation", False),
    "clearest role first": ("role_share", False),
    "by id": ("feature", True),
}

common.begin(
    "Features",
    "What each feature fires on, where it reads from and what it writes. Filter, pick a row, and walk through its "
    "dashboard below.",
)

listed = common.pick_checkpoint(common.readable(), "Checkpoint", "checkpoint")
analysis = common.analysis_or_hint(listed)
if analysis is None:
    st.stop()
labels = Labels(listed.path)
with common.sentences():
    features = analysis.features
n_heads = listed.n_heads


def reset_page() -> None:
    """Another filter begins on its first page."""
    st.session_state["page"] = 1


def pick_row(ids: list[int]) -> None:
    """A click on the table chooses its feature."""
    rows = st.session_state["browser"]["selection"]["rows"]
    if rows:
        st.session_state["feature"] = ids[rows[0]]


columns = st.columns([1, 1.4, 1.6, 1.6, 1.6, 1.6])
head = columns[0].selectbox(
    "Head", [ALL, *map(str, range(n_heads))], key="head", bind="query-params", on_change=reset_page
)
role = columns[1].selectbox(
    "Reads from", [ALL, *SLOTS], key="role", bind="query-params", on_change=reset_page,
    help="the source slot with the largest share of its positive DFA on text",
)  # fmt: skip
texts = {}
for column, key, name, what in (
    (columns[2], "fires", "Fires on", "fires on most"),
    (columns[3], "reads", "Reads token", "reads most, by DFA"),
    (columns[4], "promotes", "Promotes", "promotes most, by its direct effect on the logits"),
):
    texts[key] = column.text_input(
        name, key=key, bind="query-params", placeholder="a token, as text", on_change=reset_page,
        help=f"one of the ten tokens that the feature {what}; case and white space around it do not matter",
    )  # fmt: skip
noted = columns[5].text_input(
    "Label contains", key="noted", bind="query-params", placeholder="in your labels and notes", on_change=reset_page
)
left, middle, right = st.columns([3, 2, 1], vertical_alignment="bottom")
density = left.select_slider(
    "Density (share of tokens on which it fires)", [0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1], value=(0, 1), key="density",
    bind="query-params", on_change=reset_page,
)  # fmt: skip
sort = middle.selectbox("Order", list(SORTS), key="order", bind="query-params", on_change=reset_page)

try:
    written = labels.table().set_index("feature")
except ValueError as error:
    st.error(str(error))
    written = pd.DataFrame(columns=["label", "note"])
found = analysis.search(
    fires_on=texts["fires"],
    reads=texts["reads"],
    promotes=texts["promotes"],
    role=None if role == ALL else role,
    head=None if head == ALL else int(head),
    density=density,
)
if noted:
    text = (written["label"] + " " + written["note"]).str.lower()
    found = found[found["feature"].isin(text.index[text.str.contains(noted.lower(), regex=False)])]
by, ascending = SORTS[sort]
found = found.sort_values(by, ascending=ascending, kind="stable", na_position="last")
n_pages = max(1, -(-len(found) // PER_PAGE))
if st.session_state.get("page", 1) > n_pages:
    st.session_state["page"] = 1
page = right.number_input(f"Page of {n_pages}", 1, n_pages, key="page", bind="query-params")
shown = found.iloc[(page - 1) * PER_PAGE : page * PER_PAGE]
alive = int((features["firings"] > 0).sum())
st.caption(
    f"{len(found):,} of {alive:,} features that fire on the {analysis.meta['n_tokens']:,} tokens analysed "
    f"({len(features):,} in all)."
)
if found.empty:
    st.info("No feature fits: loosen a filter.")
else:
    ids = shown["feature"].tolist()
    table = shown[["feature", "head", "density", "max_activation", "role", "role_share", "description"]]
    st.dataframe(
        table.assign(label=table["feature"].map(written["label"]).fillna("")),
        hide_index=True,
        height=280,
        key="browser",
        on_select=lambda: pick_row(ids),
        selection_mode="single-row",
        column_config={
            "feature": st.column_config.NumberColumn(width=70),
            "head": st.column_config.NumberColumn(width=50),
            "density": st.column_config.NumberColumn(format="percent", width=80),
            "max_activation": st.column_config.NumberColumn("max", format="%.2f", width=60),
            "role_share": st.column_config.NumberColumn("share", format="percent", width=60),
            "role": st.column_config.TextColumn("reads from", width=80),
            "description": st.column_config.TextColumn(width="large"),
        },
    )

order = found["feature"].tolist()
with common.sentences():
    dashboard.show(listed, analysis, labels, order)
left, right = st.columns(2)
with left.expander("Labels: export and import"):
    dashboard.exchange(labels, len(features), listed.name)
with right.expander("The features above as one sae-vis page"):
    dashboard.sae_vis_page(listed, shown["feature"].tolist())
