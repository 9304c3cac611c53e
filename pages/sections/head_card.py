"""The card of a head: the same on Model, where it may have no SAE, and on Heads."""

import pandas as pd
import streamlit as st

from analysis.picture import Picture
from analysis.store import Analysis
from pages.components.thumbnails import thumbnails
from pages.shared.page import feature_link, small
from pages.shared.words import in_words
from trainer.checkpoint import Checkpoint

WIDTH = 362  # pixels: three side by side on a laptop
_VERDICTS = {"Monosemantic": "green", "Polysemantic": "orange", "Unclassified": "gray", "Not judged": "gray"}
_LINK = 84
_FEATURES = 3  # of a card


def show(
    title: str,
    head: pd.Series,
    pictures: dict[str, Picture],
    judged: str = "",
    checkpoint: Checkpoint | None = None,
    features: pd.DataFrame | None = None,
) -> None:
    """Scores, mean attention, what removing the head costs, its most frequent features and its verdict, where known.

    Args:
        head: its row in the heads of an analysis, or in `model.head_table`.
        pictures: mean attention, by what it is on.
        judged: prefix of the columns of the verdict: nothing, or `repeated_`.
        checkpoint: whose features these are.
        features: of `frequent`, of this head.
    """
    sentence = head.get(f"{judged}mono_verdict")
    verdict, _, why = (sentence if isinstance(sentence, str) else "").partition(": ")
    with st.container(border=True, width=WIDTH, height="stretch", gap="xsmall"):
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            st.markdown(f"**{title}**", width="content")
            if verdict in _VERDICTS:
                st.badge(verdict, color=_VERDICTS[verdict])
            if verdict and head[f"{judged}mono_near_tie"]:
                st.badge("near-tie", color="gray", help="its largest slot leads by less than 10 points")
        with st.container(horizontal=True, gap="small"):
            for name, score in _scores(head).items():
                st.markdown(f":small[:gray[{name}]]  \n**{score}**", width="content")
        if pictures:
            thumbnails(pictures, f"Mean attention of {title[:1].lower()}{title[1:]}", key=f"pattern_{head['head']}")
        if pd.notna(head.get("zero_KL")):
            small(_removed(head))
        if checkpoint is not None and features is not None:
            for feature in features.itertuples():
                with st.container(horizontal=True, vertical_alignment="center", gap=None, wrap=False):
                    label = f":small[:blue[{feature.feature}] {feature.share:.0%}]"
                    feature_link(checkpoint, feature.feature, label, icon=None, width=_LINK)
                    small(feature.text)
        if verdict:
            why = (why or verdict).replace("`", "")
            small(f"{why[:1].upper()}{why[1:]}{_apart(head, judged)}")


def frequent(checkpoint: Checkpoint, analysis: Analysis) -> pd.DataFrame:
    """The features of every head that fire most: head, feature, share of the head's firings, label or description."""
    features = analysis.features[analysis.features["firings"] > 0]
    share = features["firings"] / features.groupby("head")["firings"].transform("sum")
    table = features[["head", "feature", "firings"]].assign(share=share)
    table = table.sort_values("firings", ascending=False, kind="stable").groupby("head").head(_FEATURES)
    return table.assign(text=in_words(checkpoint, table["feature"]))


def _scores(head: pd.Series) -> dict[str, str]:
    known = {"Induction": "induction", "Previous": "previous", "Duplicate": "duplicate"}
    scores = {name: head.get(f"repeated_attention_{slot}") for name, slot in known.items()}
    shown = {name: f"{score:.0%}" for name, score in scores.items() if pd.notna(score)}
    if pd.notna(head.get("copying")):
        shown["Copying"] = f"{head['copying']:.2f} ± {head['copying_se']:.2f}"
    return shown


def _removed(head: pd.Series) -> str:
    """What the model does without the head."""
    parts = [
        f"{what} KL {head[f'{of}_KL']:.4f} ± {head[f'{of}_KL_se']:.4f}, loss {head[f'{of}_CE']:+.4f} ± "
        f"{head[f'{of}_CE_se']:.4f}"
        for what, of in (("text:", "zero"), ("repeated tokens:", "repeated_zero"))
    ]
    return f"Zeroed, on {'; on '.join(parts)} (nats)."


def _apart(head: pd.Series, judged: str) -> str:
    """Where a head looks, if its features read another slot."""
    looks, reads, agree = (head[f"{judged}{name}"] for name in ("role_attention_besides_bos", "role_dfa", "agree"))
    return "" if agree or pd.isna(reads) else f" Besides BOS it looks mostly at {looks}."
