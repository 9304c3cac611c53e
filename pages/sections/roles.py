"""Whether the features of a head do the same (monosemanticity), and whether those of two do (redundancy)."""

from urllib.parse import quote

import pandas as pd
import streamlit as st

from analysis.store import Analysis
from pages.charts import heads as charts
from pages.shared.columns import draw_table
from pages.shared.pick import pick_head, pick_one_head, pick_row, pick_text
from trainer.checkpoint import Checkpoint


def monosemanticity(checkpoint: Checkpoint, analysis: Analysis) -> None:
    """The share of features that have their head's role, and those that deviate."""
    st.caption(
        "A head is monosemantic where all its features do the same. Counted are features with 10 firings or more whose "
        "sources were attributed; a feature's role is the source slot with the largest share of its positive DFA. One "
        "deviant makes the head polysemantic (the reference's definition), so they are listed. "
        "`other`: more than 5 tokens back, neither induction nor duplicate."
    )
    prefix = "repeated_" if pick_text("Judged on", "judged", "Text") else ""
    names = [c for c in analysis.heads if c.startswith(f"{prefix}mono_")]
    heads = analysis.heads[["head", *names]].rename(columns={name: name.removeprefix(prefix) for name in names})
    st.altair_chart(charts.monosemanticity(heads))
    sheet = heads.assign(deviants=heads["mono_deviants"].map(len)).drop(columns="mono_deviants")
    draw_table(sheet, **pick_row("sheet", "of_head", range(len(heads))))
    head = pick_one_head(len(heads))
    row = heads.iloc[head]
    deviants = analysis.features.loc[row["mono_deviants"]]
    st.subheader(f"Features of head {head} that deviate", anchor=False)
    if deviants.empty:
        st.caption(
            "None: every feature judged has the head's role." if row["mono_n"] else "No feature could be judged."
        )
        return
    st.caption(f"{len(deviants)} of {row['mono_n']} judged. A click on a number opens the feature in a new tab.")
    judged = deviants[f"{prefix}role"], deviants[f"{prefix}role_share"]
    deviants = deviants.assign(role=judged[0], role_share=judged[1])
    _linked(deviants[["feature", "role", "role_share", "firings", "description"]], checkpoint)


def redundancy(checkpoint: Checkpoint, analysis: Analysis) -> None:
    """Whether features of different heads say the same."""
    redundant = analysis.meta["redundancy"]
    st.caption(
        "Two features of different heads are redundant where they fire on the same tokens (Jaccard) and write the same "
        f"direction (cosine after W_O). Counted on {redundant['n_tokens']:,} tokens. Clusters are connected "
        "components, which chain at low thresholds: the tooltip says how large the largest is."
    )
    left, right = st.columns(2)
    with left:
        st.markdown("**L0 after merging**")
        st.altair_chart(charts.merging(analysis.merging, redundant["l0"]))
    with right:
        st.markdown("**Features with a redundant partner** (both at least 0.5)")
        st.altair_chart(charts.redundancy(redundant["heads"]))
    st.markdown("**The most redundant pairs**, by the smaller of Jaccard and cosine; a click on a number opens it")
    pairs = analysis.table("pairs", filters=[("across", "==", True)])
    pairs = pairs[pairs["feature"] < pairs["other"]]
    pairs["both"] = pairs[["jaccard", "cosine"]].min(axis=1)
    head = analysis.features["head"]
    pairs["head"], pairs["other head"] = pairs["feature"].map(head), pairs["other"].map(head)
    a, b = st.columns(2)
    n_heads = len(analysis.heads)
    for chosen in (pick_head(n_heads, "Head", "one", a), pick_head(n_heads, "Other head", "two", b)):
        if chosen is not None:
            pairs = pairs[(pairs["head"] == chosen) | (pairs["other head"] == chosen)]
    pairs = pairs.nlargest(200, "both")
    description = analysis.features["description"]
    table = pairs[["feature", "head", "other", "other head", "both", "jaccard", "correlation", "cosine"]].assign(
        description=pairs["feature"].map(description), other_description=pairs["other"].map(description)
    )
    _linked(table, checkpoint)


def _linked(table: pd.DataFrame, checkpoint: Checkpoint) -> None:
    """A table in which the numbers of features are links to their dashboards.

    Links, because a page whose widgets are in its address cannot switch to another one with the same keys.
    """
    numbers = [name for name in ("feature", "other") if name in table]
    address = f"features?checkpoint={quote(checkpoint.name)}&feature="
    table = table.assign(**{name: address + table[name].astype(str) for name in numbers})
    links = {name: st.column_config.LinkColumn(display_text=r"feature=(\d+)$") for name in numbers}
    draw_table(table, links, height=280)
