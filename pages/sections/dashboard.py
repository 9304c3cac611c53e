"""The dashboard of one feature."""

import shlex
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from analysis.store import Analysis
from analysis.tokens import in_text, visible
from pages.charts import features as charts
from pages.components.listing import listing
from pages.sections import notes
from pages.shared import live, strips
from pages.shared.columns import draw_table
from pages.shared.exports import downloads
from pages.shared.page import typed
from pages.shared.pick import choose, put
from pages.shared.words import in_words
from trainer.checkpoint import Checkpoint

_SAE_VIS_FEATURES = 20


def show(checkpoint: Checkpoint, analysis: Analysis, feature: int) -> None:
    """Draw one feature.

    Raises:
        CheckpointError: an artefact is damaged.
    """
    row = analysis.feature(feature)
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    left.subheader(f"Feature {feature} of head {row['head']}", anchor=False)
    with right:
        notes.lists(checkpoint, feature)
    if row["head_share"] < 1:
        st.caption(
            f"A dense SAE's feature belongs to no one head; {row['head_share']:.0%} of its squared decoder norm is in "
            f"head {row['head']}."
        )
    st.text(row["description"])
    if not row["firings"]:
        st.info("It does not fire on the tokens analysed, so there is nothing to show. Pick another one above.")
        return
    with st.container(horizontal=True):
        st.metric("Density", f"{row['density']:.3%}", border=True, help=f"{row['firings']:,} firings")
        st.metric("Mean activation", f"{row['mean_activation']:.2f}", border=True, help="where it fires")
        st.metric("Largest", f"{row['max_activation']:.2f}", border=True)
        share = "not judged" if pd.isna(row["role_share"]) else f"{row['role_share']:.0%} {row['role']}"
        st.metric("Reads from", share, border=True, help=f"largest slot of its DFA over {row['dfa_firings']:,} firings")

    left, right = st.columns(2)
    with left:
        if not analysis.is_summary:
            st.markdown("**Activations**")
            st.altair_chart(charts.histogram(row["histogram"], 0, row["histogram_end"], "Activation", "Tokens"))
            st.markdown("**Where it reads from**")
            st.altair_chart(charts.slots(row))
        notes.show(checkpoint, feature)
    with right:
        st.markdown("**Tokens**")
        reads = {"help": "the source with the largest DFA"}
        draw_table(_tokens(row, analysis.strings), {"reads": reads}, height=175)
        st.markdown("**Direct effect on logits**, per unit of activation")
        if not analysis.is_summary:
            low, high = row["bottom_logits"][0], row["top_logits"][0]
            st.altair_chart(charts.histogram(row["logit_histogram"], low, high, "Logit effect", "Vocabulary"))
        draw_table(_logits(row, analysis.strings), {"effect": "effect"}, height=175)

    _examples(analysis, row)
    if analysis.is_summary:
        live.tell_summary(checkpoint, "histograms, shares by source slot, more examples and the nearest features")
    else:
        _neighbours(checkpoint, analysis, feature)


def export(fitting: pd.DataFrame, name: str) -> None:
    """The features that fit the filters, as a file."""
    downloads(fitting.drop(columns=["label", "note"], errors="ignore"), f"{len(fitting):,}", f"features-{name}")


def sae_vis_page(checkpoint: Checkpoint, features: list[int]) -> None:
    """A button that makes the sae-vis HTML of the first features shown."""
    chosen = features[:_SAE_VIS_FEATURES]
    st.caption(
        f"The first {len(chosen)} of this page's features on 4,000 held-out tokens, offline-capable; about 2 s a "
        "feature, and the model is loaded. All heads at once:"
    )
    st.code(f"python -m analysis.sae_vis {shlex.quote(typed(checkpoint.path))} OUT.html", language="bash")
    if chosen and st.button("Make it"):
        page = live.sae_vis_page(checkpoint, tuple(chosen))
        st.download_button("Download the HTML", page, f"{checkpoint.name}-sae-vis.html", "text/html", on_click="ignore")


def _logits(row: pd.Series, strings: dict[int, str]) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    for what, of, effect in (("promotes", "top", "effect"), ("suppresses", "bottom", "effect ")):
        if f"{of}_logits" in row:  # a summary has the top ones
            columns |= {what: [visible(strings[int(i)]) for i in row[f"{of}_logit_ids"]], effect: row[f"{of}_logits"]}
    return pd.DataFrame(columns)


def _tokens(row: pd.Series, strings: dict[int, str]) -> pd.DataFrame:
    columns: dict[str, list] = {}
    for name, total in (("fires_on", row["firings"]), ("reads", row["dfa_firings"])):
        ids, counts = row[f"{name}_ids"], row[f"{name}_counts"]
        columns[name] = [visible(strings[int(i)]) if i >= 0 else "" for i in ids]
        columns[f"{name}_share"] = [n / total if n else None for n in counts]
    return pd.DataFrame(columns)


def _examples(analysis: Analysis, row: pd.Series) -> None:
    examples = analysis.examples(int(row["feature"]))
    st.markdown("**Examples**, strongest contexts first: activation of the feature, then what each source adds (DFA)")
    st.caption(
        "Orange: activation. Green: DFA that adds to it, vermillion: that takes away. Blue: attention. The full colour "
        "is the largest of a strip; underlined: where the feature fires."
    )
    left, middle, right = st.columns([3, 2, 2], vertical_alignment="bottom")
    kinds = {"Strongest": "top"} | ({} if analysis.is_summary else {"Over quantiles": "quantile"})
    kind = kinds[choose("Which", kinds, "kind", column=left)]
    attention = middle.toggle("Attention row", key="attention", bind="query-params", help="where the head looks")
    whole = right.toggle("Whole contexts", key="whole", bind="query-params")
    for example in examples[examples["kind"] == kind].itertuples():
        texts = in_text([analysis.strings[int(i)] for i in example.token_ids])
        position = int(example.position)
        source = int(np.abs(example.dfa).argmax())
        span = None if whole else strips.around(position, source, len(texts))
        parts = [
            strips.strip(texts, example.activations, "activation", strips.ORANGE, position, span),
            strips.strip(texts, example.dfa, "DFA", strips.GREEN, position, span),
        ]
        if attention:
            parts.append(
                strips.strip(texts, example.attention, f"attention of head {example.head}", strips.BLUE, position, span)
            )
        quantile = "" if pd.isna(example.quantile) else f" · quantile {example.quantile:.0%}"
        with st.container(border=True):
            st.caption(
                f"activation {example.activation:.3f}{quantile} · document {example.document}, context "
                f"{example.context}, position {position} · sources {example.dfa_sum:.3f}, "
                f"constant {row['constant']:.3f} · largest source {position - source} back"
            )
            st.html("".join(parts))


def _neighbours(checkpoint: Checkpoint, analysis: Analysis, feature: int) -> None:
    table = analysis.neighbours(feature)
    table = table.join(analysis.features["head"], on="other").sort_values("jaccard", ascending=False)
    table["words"] = in_words(checkpoint, table["other"])
    st.markdown("**Nearest features**, by how often they fire together and by what they write; a click goes there")
    for name, across in (("of its own head", False), ("of other heads", True)):
        st.caption(name)
        part = table[table["across"] == across]
        if part.empty:
            st.caption("none: it fires on too few tokens to compare")
            continue
        rows = part[["other", "head", "jaccard", "correlation", "cosine", "words"]]
        listing(rows, "other", None, partial(put, "feature"), f"near_{across}", to_top=True, height=200)
