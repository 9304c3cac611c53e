"""Whether the features of a head do the same (monosemanticity), and whether those of two do (redundancy)."""

from functools import partial

import pandas as pd
import streamlit as st

from analysis.store import Analysis
from pages.charts import heads as charts
from pages.components.listing import listing
from pages.shared import live
from pages.shared.page import LINKED
from pages.shared.pick import pick_head, pick_one_head, pick_text, put
from pages.shared.words import in_words
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
    hidden = ["mono_deviants", "mono_verdict", "mono_unclassified", "mono_near_tie"]
    sheet = heads.assign(deviants=heads["mono_deviants"].map(len)).drop(columns=hidden)
    listing(sheet, "head", st.session_state.get("of_head", 0), partial(put, "of_head"), "sheet")
    head = pick_one_head(len(heads))
    row = heads.iloc[head]
    st.text(row["mono_verdict"])
    deviants = analysis.features.loc[row["mono_deviants"]]
    st.subheader(f"Features of head {head} that deviate", anchor=False)
    if deviants.empty:
        st.caption(
            "None: every feature judged has the head's role." if row["mono_n"] else "No feature could be judged."
        )
        return
    st.caption(f"{len(deviants)} of {row['mono_n']} judged. A click on one opens it.")
    judged = deviants[f"{prefix}role"], deviants[f"{prefix}role_share"]
    deviants = deviants.assign(role=judged[0], role_share=judged[1])
    deviants["words"] = in_words(checkpoint, deviants["feature"])
    shown = deviants[["feature", "role", "role_share", "firings", "words"]]
    _rows(shown, "feature", shown["feature"], checkpoint, "deviants")


def redundancy(checkpoint: Checkpoint, analysis: Analysis) -> None:
    """Whether features of different heads say the same."""
    if analysis.is_summary:
        live.tell_summary(checkpoint, "neighbours of features and L0 after merging")
        return
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
    st.markdown(
        "**The most redundant pairs**, by the smaller of Jaccard and cosine; a click opens the first feature, "
        "among whose neighbours the other is"
    )
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
    pairs["pair"] = range(len(pairs))
    pairs = pairs.set_index("pair", drop=False)
    for of, words in (("feature", "words"), ("other", "other_words")):
        pairs[words] = in_words(checkpoint, pairs[of])
    columns = ["pair", "feature", "head", "words", "other", "other head", "other_words", "both", "jaccard", "cosine"]
    _rows(pairs[columns], "pair", pairs["feature"], checkpoint, "pairs")


def _rows(table: pd.DataFrame, ids: str, features: pd.Series, checkpoint: Checkpoint, key: str) -> None:
    """Rows that lead to the dashboards of features, each by a column of ids of their own."""
    listing(table, ids, None, lambda row: put("opened", int(features[row])), key, height=300)
    if (opened := st.session_state.pop("opened", None)) is not None:
        st.switch_page("pages/features.py", query_params={LINKED: checkpoint.name, "feature": str(opened)})
