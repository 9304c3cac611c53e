"""How every column of a table is drawn, by the name of its field."""

from functools import partial
from typing import Any

import pandas as pd
import streamlit as st

_number, _text, _bar = st.column_config.NumberColumn, st.column_config.TextColumn, st.column_config.ProgressColumn
_percent, _count = partial(_number, format="percent"), partial(_number, format="localized")
_share = partial(_bar, format="percent", min_value=0, max_value=1)

COLUMNS: dict[str, Any] = {
    # a checkpoint, and its training
    "name": _text(pinned=True),
    "L0": _number(format="%.1f"),
    "FVU": _number(format="%.3f"),
    **{name: _number(name.replace("_", " "), format="%.3f") for name in ("CE_score", "KL_score", "norm_ratio", "bias")},
    **{f"{name}_se": _number(f"{name.replace('_', ' ')} ±", format=form)
       for name, form in (("L0", "%.1f"), ("MSE", "%.2g"), ("MSE_per_dim", "%.2g"),
                          *((name, "%.3f") for name in ("FVU", "CE_score", "KL_score", "norm_ratio", "bias")))},
    "MSE": _number(format="%.4g"),
    "MSE_per_dim": _number("MSE per dim", format="%.3g"),
    "silent_fraction": _percent("silent", help="features that fire on none of the tokens evaluated on"),
    "dead_fraction": _percent("dead", help="features that had not fired for `dead_after_tokens` when training ended, "
                                           "or at its last logged step"),
    "n_tokens": _count("evaluated on"),
    "parameters": _count(),
    "tokens_seen": _count("training tokens"),
    "training_minutes": _number("training minutes", format="%.1f"),
    "d_sae": _count("features"),
    "step": _count(),
    "steps": _count("of"),
    "done": _share(width=110),
    "tokens_per_second": _count("tokens/s", step=1),
    "loss": _number(format="%.4g"),
    "last_line": _text("last line ago"),
    "left": _text(),
    # a feature
    "feature": _number(width=70),
    "other": _number("feature", width=70),
    "head": _number(width=50),
    "density": _percent(width=80),
    "max_activation": _number("max", format="%.2f", width=60),
    "role": _text("reads from", width=80),
    "role_share": _percent("share", width=60),
    "precision": _percent("of its firings", width=85, help="share of the feature's firings that are on the token"),
    "recall": _percent("of the token's", width=85, help="share of the token's places on which the feature fires"),
    "read_precision": _percent("of its reads", width=80, help="share of its firings whose largest source it is"),
    "examples": _count(width=75, help="of its examples that have the words"),
    "fires_on": _text("fires on", width=75),
    "fires_on_share": _percent("share", width=60),
    "reads": _text(width=75),
    "reads_share": _percent("share", width=60),
    # two features
    "pair": None,
    "other head": _number("head", width=50),
    "other_words": _text("label or description", help="of the other"),
    "both": _number(format="%.2f"),
    "jaccard": _number(format="%.2f", width=60, help="tokens on which both fire over tokens on which either does"),
    "correlation": _number(format="%.2f", width=70, help="of activations"),
    "cosine": _number(format="%.2f", width=60, help="of what they add to the residual stream"),
    # a head
    "role_attention": "attention",
    "role_attention_besides_bos": "besides BOS",
    "role_dfa": "DFA",
    "repeated_role_attention": "attention, repeated",
    "repeated_role_attention_besides_bos": "besides BOS, repeated",
    "repeated_role_dfa": "DFA, repeated",
    "agree": st.column_config.CheckboxColumn(help="DFA with attention, or with attention besides BOS"),
    "repeated_agree": "agree, repeated",
    "copying": _number(format="%.2f", help="1 copies, 0 is chance, -1 suppresses"),
    "copying_se": _number("±", format="%.2f"),
    "L0_share": _percent("of L0"),
    "explained_share": _percent("of explained variance"),
    "KL_share": _percent("of KL recovered"),
    "entropy": _number(format="%.2f"),
    "maximum": _percent("largest weight"),
    "distance": _number("tokens back", format="%.1f"),
    "mono_role": "role of the head",
    "mono_n": "features judged",
    "mono_share": _percent("have its role"),
    "mono_low": _percent("from"),
    "mono_high": _percent("to"),
    "mono_weighted": _percent("by firing"),
    "mono_weighted_low": _percent("from "),
    "mono_weighted_high": _percent("to "),
    # a head of a model
    **{score: _percent(width=70, help="of attention on repeated random tokens")
       for score in ("induction", "previous", "duplicate")},
    **{f"{of}_{what}": _number(f"{of.replace('_', ' ')}: {what}", format="%.4f", help="without the head (nats)")
       for of in ("zero", "mean", "resample", "repeated_zero") for what in ("KL", "CE")},
    # a prompt
    "activation": _number(format="%.3f", width=78),
    "share": _share("of head", width=70, help="its part of all that fires in the head at that token"),
    "firings": _count("fires", width=50, help="tokens on which it fires"),
    "along": _text("along the prompt", width=116, help="where it fires, and how strongly; hover it for the token"),
    "words": _text("label or description", help="yours where you wrote one, else the description of the analysis"),
    "from": _text("reads from", width=135, help="the source with the largest DFA where it fires strongest"),
    "source share": _percent("share of its DFA"),
    "effect": _number("effect on the logit", format="%.4f"),
    "from source": _number("DFA from it", format="%.3f"),
    "attention share": _percent("share", width=70),
    "DFA share": _percent("share of DFA", width=90),
    # a prompt without something
    "id": None,
    "probability": _percent("p"),
    **{f"{way} {name}": _number(f"{way}: {short}", format=form)
       for way in ("direct", "full")
       for name, short, form in (("probability", "p", "percent"), ("logit change", "\u0394 logit", "%+.4f"),
                                 ("log-probability change", "\u0394 log p", "%+.4f"))},
    # two checkpoints
    "score": _number(format="%.2f", width=60),
    "activation_a": _number("activation", format="%.3f"),
    "activation_b": _number("activation", format="%.3f"),
    "b_given_a": _percent("P(block | dense)", help="share of the dense feature's firings on which the part fires"),
    "a_given_b": _percent("P(dense | block)", help="share of the part's firings on which the dense feature fires"),
    "norm_share": _percent("decoder norm there", help="share of the dense feature's squared decoder norm in the head"),
    "parts": _number(width=60),
    "covered": _percent(help="share of its summed activation on tokens where one of its parts fires"),
    "chance": _percent("by chance", help="share of all tokens where one of its parts fires"),
    "nearest": _number(width=70),
    "nearest_score": _number("its score", format="%.2f", width=70),
}  # fmt: skip


def draw_table(frame: pd.DataFrame, settings: dict[str, Any] | None = None, **more: Any) -> None:
    """A table without its index.

    Args:
        settings: as `configured` takes them.
        more: of `st.dataframe`, as `pick_row` gives it.
    """
    st.dataframe(frame, hide_index=True, column_config=configured(frame, settings), **more)


def configured(frame: pd.DataFrame, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """How the columns of a table are drawn, as `st.dataframe` takes it; None where one is hidden.

    Args:
        settings: where this table differs from COLUMNS: a width, a label, None to hide the column, or a column's
            whole configuration.
    """
    known = {name: COLUMNS[name] for name in frame if name in COLUMNS}
    columns = {name: {"label": of} if isinstance(of, str) else of for name, of in known.items()}
    for name, setting in (settings or {}).items():
        before = columns.get(name) or {}
        part = {int: {"width": setting}, str: {"label": setting}}.get(type(setting), setting)
        columns[name] = None if setting is None else before | part if isinstance(before, dict) else part
    return columns
