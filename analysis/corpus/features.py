"""The table of all features: what each fires on, reads, writes, and a short description made of that."""

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analysis import attribution as dfa
from analysis.corpus.heads import MIN_ATTRIBUTED, Roles
from analysis.corpus.running_statistics import FeatureStatistics, Sources
from analysis.logits import LogitEffects
from analysis.tokens import visible

N_TOKENS = 10  # tokens kept of those that a feature fires on, and reads
_SHORT = 5  # of them, and of logits, in a summary


def feature_table(
    statistics: FeatureStatistics,
    repeats: Sources,
    effects: LogitEffects,
    constants: Float[Tensor, " feature"],
    head: np.ndarray,
    head_share: np.ndarray,
) -> pd.DataFrame:
    """One row per feature; lists are numpy arrays. Descriptions are added by `describe`.

    `histogram` has 64 equal bins from 0 to `histogram_end`; `logit_histogram` 40 from the lowest to the highest logit
    effect. `constant` is the part of the pre-activation that no source explains. Slot columns are shares of
    positive DFA over `dfa_firings` firings, on text and (`repeated_`) on repeated random tokens; `near_tie` marks a
    role that leads by less than 10 points.
    """
    n = int(statistics.n_tokens)
    firings = statistics.firings.numpy()
    fires_on, fires_on_counts = statistics.fires_on.top(len(firings), N_TOKENS)
    reads, reads_counts = statistics.sources.reads.top(len(firings), N_TOKENS)
    table = pd.DataFrame(
        {
            "feature": np.arange(len(firings), dtype=np.int32),
            "head": head.astype(np.int16),
            "head_share": head_share,
            "firings": firings,
            "density": firings / n,
            "mean_activation": statistics.total.numpy() / np.maximum(firings, 1),
            "max_activation": statistics.maximum.numpy(),
            "constant": constants.numpy(),
        }
    )
    for prefix, sources in (("", statistics.sources), ("repeated_", repeats)):
        shares, role, share, _ = roles = Roles.of(sources.mass)
        table[f"{prefix}dfa_firings"] = sources.firings.numpy()
        judged = (role >= 0) & (sources.firings.numpy() >= MIN_ATTRIBUTED)
        table[f"{prefix}role"] = [dfa.SLOTS[i] if ok else None for i, ok in zip(role, judged, strict=True)]
        table[f"{prefix}role_share"] = np.where(judged, share, np.nan).astype(np.float32)
        table[f"{prefix}near_tie"] = judged & roles.near_tie
        for index, slot in enumerate(dfa.SLOTS):
            table[f"{prefix}dfa_{slot}"] = shares[:, index]
    lists: dict[str, Tensor] = {
        "histogram": statistics.histogram,
        "fires_on_ids": fires_on,
        "fires_on_counts": fires_on_counts,
        "reads_ids": reads,
        "reads_counts": reads_counts,
        "top_logit_ids": effects.top_ids,
        "top_logits": effects.top,
        "bottom_logit_ids": effects.bottom_ids,
        "bottom_logits": effects.bottom,
        "logit_histogram": effects.histogram,
    }
    exponent = torch.where(statistics.firings > 0, statistics.exponent, 0)
    table["histogram_end"] = torch.exp2(exponent.float()).numpy()
    for name, values in lists.items():
        array = values.numpy()
        table[name] = list(array.astype(np.float32 if array.dtype.kind == "f" else np.int32))
    return table


def shortened(table: pd.DataFrame, columns: Collection[str]) -> pd.DataFrame:
    """Of `feature_table`: some columns, lists of five, at the precision at which they are shown."""
    short = table[[name for name in table if name in columns]].copy()
    for name in short:
        if isinstance(short[name].iloc[0], np.ndarray):
            kind = np.float16 if short[name].iloc[0].dtype.kind == "f" else np.int32
            short[name] = [values[:_SHORT].astype(kind) for values in short[name]]
        elif short[name].dtype == np.float64:
            short[name] = short[name].astype(np.float32)
    return short


def count_table(statistics: FeatureStatistics) -> pd.DataFrame:
    """How often each feature fires on each token, and how often that token is what it reads most.

    token, feature, firings, reads; by token and feature, pairs with neither left out. `reads` is of `dfa_firings`
    firings.
    """
    columns = []
    for name, tally in (("firings", statistics.fires_on), ("reads", statistics.sources.reads)):
        feature, token, count = (column.int().numpy() for column in tally.pairs())
        columns.append(
            pd.Series(count, pd.MultiIndex.from_arrays([token, feature], names=["token", "feature"]), name=name)
        )
    return pd.concat(columns, axis=1).fillna(0).astype(np.int32).sort_index().reset_index()


def describe(table: pd.DataFrame, strings: dict[int, str]) -> list[str]:
    """One line per feature, of its largest source slot and the tokens that it reads and fires on.

    `previous token 84 %: ' of' 60 %, ' the' 20 % | on ' House' 55 %`. Percentages of tokens are of its firings.
    """
    lines = []
    rows: Any = table.itertuples()
    for row in rows:
        if not row.firings:
            lines.append("never fires")
            continue
        fires = _tokens(row.fires_on_ids, row.fires_on_counts, row.firings, strings)
        if pd.isna(row.role):  # pandas 3 makes NaN of None among strings
            lines.append(f"rare | on {fires}")
            continue
        reads = _tokens(row.reads_ids, row.reads_counts, row.dfa_firings, strings)
        lines.append(f"{dfa.SLOT_TABLE[row.role].words} {row.role_share:.0%}: {reads} | on {fires}")
    return lines


def named_tokens(ids: np.ndarray, counts: np.ndarray, total: int) -> list[tuple[int, float]]:
    """Up to three tokens that make up at least 5 % each, with their shares: those that a description names."""
    shares = ((int(i), c / total) for i, c in zip(ids[:3], counts[:3], strict=True) if i >= 0)
    return [(i, share) for i, share in shares if share >= 0.05]


def _tokens(ids: np.ndarray, counts: np.ndarray, total: int, strings: dict[int, str]) -> str:
    named = named_tokens(ids, counts, total)
    return ", ".join(f"'{visible(strings[i])}' {share:.0%}" for i, share in named) or "many tokens"
