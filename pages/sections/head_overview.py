"""All heads at a glance: what they read by source slot, a card for each, and behind it every number."""

import pandas as pd
import streamlit as st

from analysis.picture import Picture
from analysis.store import Analysis
from analysis.tokens import visible
from pages.charts import heads as charts
from pages.sections import head_card
from pages.shared.columns import draw_table
from pages.shared.page import refuse
from pages.shared.pick import choose, pick_one_head, pick_text
from trainer.checkpoint import Checkpoint, CheckpointError

_MEASURES = {"DFA of its features": "dfa", "Attention": "attention"}
_TEXTS = {"": "text", "repeated_": "repeated random tokens"}


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
    features = head_card.frequent(checkpoint, analysis)
    with st.container(horizontal=True):
        for index, head in heads.iterrows():
            pictures = {name: of_heads[index] for name, of_heads in patterns.items()}
            of_head = features[features["head"] == head["head"]]
            head_card.show(f"Head {head['head']}", head, pictures, judged, checkpoint, of_head)
    with st.expander("Every number as a table"):
        _table(analysis)
    if analysis.has("copying"):
        with st.expander("The pairs behind a copying score"):
            _copying(analysis)


def _patterns(analysis: Analysis) -> dict[str, list[Picture]]:
    """Pictures of every head by what they are on, explained; none, with a sentence, where they cannot be had."""
    try:
        pictures = analysis.patterns
    except CheckpointError as error:
        refuse(error)
        return {}
    if analysis.is_summary:
        st.caption("A summary has no thumbnails of mean attention: Model has those of all layers.")
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
