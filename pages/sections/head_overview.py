"""All heads at a glance: what they read by source slot, a card for each, and behind it every number."""

import pandas as pd
import streamlit as st

from analysis.picture import Picture
from analysis.store import Analysis
from analysis.tokens import visible
from pages.charts import heads as charts
from pages.components.thumbnails import thumbnails
from pages.shared.columns import draw_table
from pages.shared.page import feature_link, refuse, small
from pages.shared.pick import choose, pick_one_head, pick_text
from pages.shared.words import in_words
from trainer.checkpoint import Checkpoint, CheckpointError

_MEASURES = {"DFA of its features": "dfa", "Attention": "attention"}
_TEXTS = {"": "text", "repeated_": "repeated random tokens"}
_VERDICTS = {"Monosemantic": "green", "Polysemantic": "orange", "Unclassified": "gray", "Not judged": "gray"}
_CARD = 362  # pixels: three side by side on a laptop
_LINK = 84
_FEATURES = 3  # of a card


def show(checkpoint: Checkpoint, analysis: Analysis) -> None:
    """Shares by slot on text and on repeated tokens, and a card per head."""
    heads = analysis.heads
    left, right = st.columns(2)
    measure = _MEASURES[choose("Shares by source slot, of", _MEASURES, "shares", column=left)]
    judged = "repeated_" if pick_text("Verdicts on", "judged", "Text", right) else ""
    for column, (prefix, text) in zip(st.columns(2), _TEXTS.items(), strict=True):
        column.altair_chart(charts.slot_map(heads, f"{prefix}{measure}", f"On {text}, %"))
    st.caption(
        "Induction, previous: share of attention there on repeated tokens. Copying: 1 copies, 0 is chance, -1 "
        "suppresses; ± one standard error. Features: most frequent on text, with share of firings."
        + (" A dense SAE's feature counts for the head that it writes to most." if checkpoint.is_dense else "")
    )
    patterns = _patterns(analysis)
    features = _frequent(checkpoint, analysis)
    with st.container(horizontal=True):
        for index, head in heads.iterrows():
            with st.container(border=True, width=_CARD, height="stretch", gap="xsmall"):
                pictures = {name: of_heads[index] for name, of_heads in patterns.items()}
                _card(checkpoint, head, judged, pictures, features[features["head"] == head["head"]])
    with st.expander("Every number as a table"):
        _table(analysis)
    with st.expander("The pairs behind a copying score"):
        _copying(analysis)


def _patterns(analysis: Analysis) -> dict[str, list[Picture]]:
    """Pictures of every head by what they are on, explained; none, with a sentence, where they cannot be had."""
    try:
        pictures = analysis.patterns
    except CheckpointError as error:
        refuse(error)
        return {}
    if not pictures:
        st.caption("This analysis is older than thumbnails of patterns: `python -m analysis` makes it anew, with them.")
        return {}
    text, repeated = (analysis.meta["patterns"][name] for name in ("text", "repeated"))
    each = "a token" if repeated["step"] == 1 else f"{repeated['step']} neighbouring tokens"
    st.caption(
        "Thumbnails: mean attention. A row is a token, a column what it reads, the first of each is BOS. On text: "
        f"{text['contexts']:,} contexts, of each the first {text['cells']} positions. On repeated random tokens: "
        f"{repeated['contexts']:,} contexts as a whole, a row or column is {each}; induction is the diagonal of the "
        "lower left quarter. Opacity is the square root of attention, on one scale for all."
    )
    return {"text": pictures["text"], "repeated tokens": pictures["repeated"]}


def _card(
    checkpoint: Checkpoint, head: pd.Series, judged: str, pictures: dict[str, Picture], features: pd.DataFrame
) -> None:
    verdict, _, why = head[f"{judged}mono_verdict"].partition(": ")
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        st.markdown(f"**Head {head['head']}**", width="content")
        if verdict in _VERDICTS:
            st.badge(verdict, color=_VERDICTS[verdict])
        if head[f"{judged}mono_near_tie"]:
            st.badge("near-tie", color="gray", help="its largest slot leads by less than 10 points")
    scores = {
        "Induction": f"{head['repeated_attention_induction']:.0%}",
        "Previous": f"{head['repeated_attention_previous']:.0%}",
        "Copying": f"{head['copying']:.2f} ± {head['copying_se']:.2f}",
    }
    with st.container(horizontal=True, gap="large"):
        for name, score in scores.items():
            st.markdown(f":small[:gray[{name}]]  \n**{score}**", width="content")
    if pictures:
        thumbnails(pictures, f"Mean attention of head {head['head']}", key=f"pattern_{head['head']}")
    for feature in features.itertuples():
        with st.container(horizontal=True, vertical_alignment="center", gap=None, wrap=False):
            label = f":small[:blue[{feature.feature}] {feature.share:.0%}]"
            feature_link(checkpoint, feature.feature, label, icon=None, width=_LINK)
            small(feature.text)
    why = (why or verdict).replace("`", "")
    small(f"{why[:1].upper()}{why[1:]}{_apart(head, judged)}")


def _apart(head: pd.Series, judged: str) -> str:
    """Where a head looks, if its features read another slot."""
    looks, reads, agree = (head[f"{judged}{name}"] for name in ("role_attention_besides_bos", "role_dfa", "agree"))
    return "" if agree or pd.isna(reads) else f" Besides BOS it looks mostly at {looks}."


def _frequent(checkpoint: Checkpoint, analysis: Analysis) -> pd.DataFrame:
    """The features of every head that fire most: head, feature, share of the head's firings, label or description."""
    features = analysis.features[analysis.features["firings"] > 0]
    share = features["firings"] / features.groupby("head")["firings"].transform("sum")
    table = features[["head", "feature", "firings"]].assign(share=share)
    table = table.sort_values("firings", ascending=False, kind="stable").groupby("head").head(_FEATURES)
    return table.assign(text=in_words(checkpoint, table["feature"]))


def _table(analysis: Analysis) -> None:
    st.caption(
        f"On {analysis.meta['head_tokens']:,} tokens of text, and on random tokens repeated once. Role: the largest "
        "source slot, by attention (besides BOS, on which heads rest) and by the DFA of the head's features. Entropy "
        "(nats), largest weight and mean distance are of attention on text, the distance without BOS."
    )
    shown = analysis.heads[
        ["head", "role_attention", "role_attention_besides_bos", "role_dfa", "agree", "repeated_role_attention",
         "repeated_role_attention_besides_bos", "repeated_role_dfa", "repeated_agree", "copying", "copying_se",
         "L0_share", "explained_share", "KL_share", "FVU", "entropy", "maximum", "distance"]
    ]  # fmt: skip
    draw_table(shown)


def _copying(analysis: Analysis) -> None:
    """The pairs with most attention of one head, as tokens."""
    head = pick_one_head(len(analysis.heads))
    row = analysis.heads.iloc[head]
    st.caption(
        f"What head {head} reads is among the 10 most promoted tokens in {row['copying_top10']:.0%}, among the 10 most "
        f"suppressed in {row['copying_bottom10']:.0%}, by attention."
    )
    pairs = analysis.copying[analysis.copying["head"] == head]
    contexts = analysis.contexts(pairs["context"].unique().tolist())
    at = lambda context, position: visible(analysis.strings[int(contexts[context][position])])  # noqa: E731
    table = pd.DataFrame(
        {
            "from": [at(pair.context, pair.query) for pair in pairs.itertuples()],
            "reads": [at(pair.context, pair.source) for pair in pairs.itertuples()],
            "attention": pairs["attention"].round(2),
            "rank of its logit": pairs["rank"] + 1,
        }
    )
    draw_table(table, height=250)
