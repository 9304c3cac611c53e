"""The parts of the Heads page that read the analysis: role cards, monosemanticity, redundancy across heads."""

from urllib.parse import quote

import pandas as pd
import streamlit as st

from analysis.artefacts import Analysis
from analysis.prompt import visible
from pages import head_charts
from trainer import checkpoint

_PERCENT = st.column_config.NumberColumn(format="percent")


def cards(listed: checkpoint.Listed, analysis: Analysis) -> None:
    """Every head in a table, one of them as a card."""
    heads = analysis.heads
    st.caption(
        f"On {analysis.meta['head_tokens']:,} tokens of text and on repeated random tokens. Role: the largest source "
        "slot, by attention (besides BOS, on which heads rest) and by the DFA of the head's features. Tick a row for "
        "its card."
    )
    shown = heads[
        ["head", "role_attention", "role_attention_besides_bos", "role_dfa", "agree", "repeated_role_attention",
         "repeated_role_attention_besides_bos", "repeated_role_dfa", "repeated_agree", "copying", "copying_se",
         "L0_share", "explained_share", "KL_share", "FVU"]
    ]  # fmt: skip
    st.dataframe(
        shown,
        hide_index=True,
        key="roles",
        on_select=_pick_head,
        selection_mode="single-row",
        column_config={
            "role_attention": "attention",
            "role_attention_besides_bos": "besides BOS",
            "role_dfa": "DFA",
            "repeated_role_attention": "attention, repeated",
            "repeated_role_attention_besides_bos": "besides BOS, repeated",
            "repeated_role_dfa": "DFA, repeated",
            "agree": st.column_config.CheckboxColumn(help="DFA with attention, or with attention besides BOS"),
            "repeated_agree": "agree, repeated",
            "copying": st.column_config.NumberColumn(format="%.2f", help="1 copies, 0 is chance, -1 suppresses"),
            "copying_se": st.column_config.NumberColumn("±", format="%.2f"),
            "L0_share": st.column_config.NumberColumn("of L0", format="percent"),
            "explained_share": st.column_config.NumberColumn("of explained variance", format="percent"),
            "KL_share": st.column_config.NumberColumn("of KL recovered", format="percent"),
            "FVU": st.column_config.NumberColumn(format="%.3f"),
        },
    )
    row = heads.iloc[_head(heads)]
    st.subheader(f"Head {row['head']}", anchor=False)
    left, right = st.columns([3, 2])
    with left:
        st.markdown("**Where it looks, and what its features read**")
        st.altair_chart(head_charts.role_card(row))
        for prefix, text in (("", "text"), ("repeated_", "repeated random tokens")):
            look, read = row[f"{prefix}role_attention_besides_bos"], row[f"{prefix}role_dfa"]
            if pd.isna(read):
                st.caption(f"On {text} no feature of it fires.")
            elif not row[f"{prefix}agree"]:
                st.caption(
                    f"On {text} the two disagree: it looks mostly at {look} (besides BOS), its features read {read}."
                )
    with right:
        st.markdown("**Copying**")
        st.markdown(
            f"{row['copying']:.2f} ± {row['copying_se']:.2f}: what it reads is among the 10 most promoted tokens in "
            f"{row['copying_top10']:.0%}, among the 10 most suppressed in {row['copying_bottom10']:.0%}, by attention."
        )
        st.dataframe(_copying(analysis, int(row["head"])), hide_index=True, height=250)


def monosemanticity(listed: checkpoint.Listed, analysis: Analysis) -> None:
    """The share of features that have their head's role, and those that deviate."""
    st.caption(
        "A head is monosemantic where all its features do the same. Counted are features with 10 firings or more whose "
        "sources were attributed; a feature's role is the source slot with the largest share of its positive DFA. One "
        "deviant makes the head polysemantic (the reference's definition), so they are listed. "
        "`other`: more than 5 tokens back, neither induction nor duplicate."
    )
    on = st.segmented_control(
        "Judged on",
        ["Text", "Repeated random tokens"],
        default="Text",
        required=True,
        key="judged",
        bind="query-params",
    )
    prefix = "repeated_" if on != "Text" else ""
    names = [c for c in analysis.heads if c.startswith(f"{prefix}mono_")]
    heads = analysis.heads[["head", *names]].rename(columns={name: name.removeprefix(prefix) for name in names})
    st.altair_chart(head_charts.monosemanticity(heads))
    st.dataframe(
        heads.assign(deviants=heads["mono_deviants"].map(len)).drop(columns="mono_deviants"),
        hide_index=True,
        key="sheet",
        on_select=lambda: _pick_head("sheet"),
        selection_mode="single-row",
        column_config={
            "mono_role": "role of the head",
            "mono_n": "features judged",
            "mono_share": st.column_config.NumberColumn("have its role", format="percent"),
            "mono_low": st.column_config.NumberColumn("from", format="percent"),
            "mono_high": st.column_config.NumberColumn("to", format="percent"),
            "mono_weighted": st.column_config.NumberColumn("by firing", format="percent"),
            "mono_weighted_low": st.column_config.NumberColumn("from ", format="percent"),
            "mono_weighted_high": st.column_config.NumberColumn("to ", format="percent"),
        },
    )
    head = _head(heads)
    row = heads.iloc[head]
    deviants = analysis.features.loc[row["mono_deviants"]]
    st.subheader(f"Features of head {head} that deviate", anchor=False)
    if deviants.empty:
        st.caption(
            "None: every feature judged has the head's role." if row["mono_n"] else "No feature could be judged."
        )
        return
    st.caption(f"{len(deviants)} of {row['mono_n']} judged. A click on a number opens the feature in a new tab.")
    columns = ["feature", f"{prefix}role", f"{prefix}role_share", "firings", "description"]
    _linked(deviants[columns], listed, {f"{prefix}role_share": _PERCENT})


def redundancy(listed: checkpoint.Listed, analysis: Analysis) -> None:
    """Whether features of different heads say the same."""
    found = analysis.meta["redundancy"]
    st.caption(
        "Two features of different heads are redundant where they fire on the same tokens (Jaccard) and write the same "
        f"direction (cosine after W_O). Counted on {found['n_tokens']:,} tokens. Clusters are connected components, "
        "which chain at low thresholds: the tooltip says how large the largest is."
    )
    left, right = st.columns(2)
    with left:
        st.markdown("**L0 after merging**")
        st.altair_chart(head_charts.merging(analysis.merging, found["l0"]))
    with right:
        st.markdown("**Features with a redundant partner** (both at least 0.5)")
        st.altair_chart(head_charts.redundancy(found["heads"]))
    st.markdown("**The most redundant pairs**, by the smaller of Jaccard and cosine; a click on a number opens it")
    pairs = analysis.table("pairs", filters=[("across", "==", True)])
    pairs = pairs[pairs["feature"] < pairs["other"]]
    pairs["both"] = pairs[["jaccard", "cosine"]].min(axis=1)
    head = analysis.features["head"]
    pairs["head"], pairs["other head"] = pairs["feature"].map(head), pairs["other"].map(head)
    a, b = st.columns(2)
    options = ["all", *map(str, range(len(analysis.heads)))]
    one = a.selectbox("Head", options, key="one", bind="query-params")
    two = b.selectbox("Other head", options, key="two", bind="query-params")
    for chosen in (one, two):
        if chosen != "all":
            pairs = pairs[(pairs["head"] == int(chosen)) | (pairs["other head"] == int(chosen))]
    pairs = pairs.nlargest(200, "both")
    description = analysis.features["description"]
    table = pairs[["feature", "head", "other", "other head", "both", "jaccard", "correlation", "cosine"]].assign(
        reads=pairs["feature"].map(description), other_reads=pairs["other"].map(description)
    )
    _linked(table, listed, {})


def _head(heads: pd.DataFrame) -> int:
    """The head whose details are shown, chosen in a table or here."""
    return int(st.selectbox("Head", list(range(len(heads))), key="of_head", bind="query-params"))


def _pick_head(table: str = "roles") -> None:
    rows = st.session_state[table]["selection"]["rows"]
    if rows:
        st.session_state["of_head"] = rows[0]


def _linked(table: pd.DataFrame, listed: checkpoint.Listed, config: dict) -> None:
    """A table in which the numbers of features are links to their dashboards.

    Links, because a page whose widgets are in its address cannot switch to another one with the same keys.
    """
    numbers = [name for name in ("feature", "other") if name in table]
    address = f"features?checkpoint={quote(listed.path.name)}&feature="
    links = {name: st.column_config.LinkColumn(display_text=r"feature=(\d+)$") for name in numbers}
    table = table.assign(**{name: address + table[name].astype(str) for name in numbers})
    st.dataframe(table, hide_index=True, height=280, column_config=config | links)


def _copying(analysis: Analysis, head: int) -> pd.DataFrame:
    """The pairs behind a copying score, as tokens."""
    pairs = analysis.copying[analysis.copying["head"] == head]
    contexts = analysis.contexts(pairs["context"].unique().tolist())
    at = lambda context, position: visible(analysis.strings[int(contexts[context][position])])  # noqa: E731
    return pd.DataFrame(
        {
            "from": [at(pair.context, pair.query) for pair in pairs.itertuples()],
            "reads": [at(pair.context, pair.source) for pair in pairs.itertuples()],
            "attention": pairs["attention"].round(2),
            "rank of its logit": pairs["rank"] + 1,
        }
    )
