"""The description of a feature as a rule, and how well the rule tells where the feature fires on further text."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from analysis import attribution as dfa
from analysis.attribution import Chunk, Firings, Reader, TokenKinds
from analysis.corpus.features import named_tokens
from analysis.corpus.running_statistics import Largest
from analysis.detection import Detected, detected
from trainer.kernels import workers

QUANTILE = 0.5  # of a feature's activations, from which it counts as firing
EXAMPLES = 20  # of a feature that fire, and as many others
_MIN_FIRING = 5  # examples without which a description is not scored


class Rule(NamedTuple):
    """`previous token 84 %: ' of' 60 % | on ' House' 55 %`: it says that a feature fires where both parts hold."""

    slot: int | None
    """index into SLOTS; None where there was too little to judge"""
    reads: frozenset[int]
    """tokens of which one stands in the slot; any, if empty"""
    on: frozenset[int]
    """tokens on which it fires; any, if empty"""

    def score(self, tokens: np.ndarray, slots: np.ndarray) -> float:
        """1 where both parts hold, 0.5 where one does.

        Args:
            tokens: ids up to the position [source].
            slots: of its sources [source].
        """
        sources = tokens[slots == self.slot].tolist() if self.slot is not None else []
        reads = self.slot is None or any(not self.reads or token in self.reads for token in sources)
        return (reads + (not self.on or int(tokens[-1]) in self.on)) / 2


def rules(features: pd.DataFrame) -> list[Rule]:
    """What the descriptions of `feature_table` say, by feature."""
    found = []
    rows: Any = features.itertuples()
    for row in rows:
        judged = not pd.isna(row.role)
        reads = named_tokens(row.reads_ids, row.reads_counts, row.dfa_firings) if judged else []
        on = named_tokens(row.fires_on_ids, row.fires_on_counts, row.firings)
        slot = dfa.SLOTS.index(row.role) if judged else None
        found.append(Rule(slot, frozenset(i for i, _ in reads), frozenset(i for i, _ in on)))
    return found


class FurtherFirings:
    """Where every feature fires on the contexts from `first` on.

    Args:
        first: context; those before were used to write descriptions.
    """

    def __init__(self, reader: Reader, first: int) -> None:
        self._reader, self._first = reader, first
        self.feature: list[Tensor] = []
        self.context: list[Tensor] = []
        self.position: list[Tensor] = []
        self.value: list[Tensor] = []

    @torch.no_grad()
    def update(self, batch: list[Chunk]) -> None:
        """Keep the firings of a forward's contexts from `first` on."""
        further = [chunk for chunk in batch if chunk.ids[-1] >= self._first]
        fired = workers.each(lambda chunk: Firings.of(self._reader.encode(chunk)), further)
        for chunk, firings in zip(further, fired, strict=True):
            context = chunk.ids[firings.context.cpu()]
            kept = context >= self._first
            self.context.append(context[kept].int())
            columns = (firings.feature.int(), firings.position.short(), firings.value)
            for name, column in zip(("feature", "position", "value"), columns, strict=True):
                getattr(self, name).append(column.cpu()[kept])

    def absorb(self, other: "FurtherFirings") -> None:
        """Add the firings of other contexts; nothing depends on their order."""
        for name in ("feature", "context", "position", "value"):
            getattr(self, name).extend(getattr(other, name))


def choose_detection(further: FurtherFirings, sample: Largest, n_further: int, length: int, seed: int) -> pd.DataFrame:
    """Examples of which an explanation tells whether the feature fires there, in random order within each feature.

    feature, context, position, fires. Drawn at random from further text: up to 20 firings at or above the feature's
    median activation, and as many other tokens. Features with fewer than 5 such firings have none.

    Args:
        sample: firings of each feature on the text analysed, for their median.
        n_further, length: contexts of further text, and tokens of each.
    """
    if not further.feature:
        return pd.DataFrame(columns=["feature", "context", "position", "fires"]).astype(int).astype({"fires": bool})
    feature, context, position, value = (
        torch.cat(getattr(further, name)).numpy() for name in ("feature", "context", "position", "value")
    )
    median = torch.where(sample.at >= 0, sample.value, torch.nan).nanquantile(QUANTILE, 1).numpy()  # [feature]
    strong = value >= median[feature]
    at = ((context.astype(np.int64) - further._first) * (length - 1) + position - 1)[strong]  # BOS is no example
    order = np.lexsort([at, feature[strong]])
    at = at[order]
    ids, starts, counts = np.unique(feature[strong][order], return_index=True, return_counts=True)
    parts = []
    for one, start, n in zip(ids.tolist(), starts, counts, strict=True):
        own = at[start : start + n]
        if n < _MIN_FIRING:
            continue
        draw = np.random.default_rng([seed, one])
        firing = draw.choice(own, min(EXAMPLES, len(own)), replace=False)
        # Drawn twice as often as needed: a feature that fires on more than half of the text has fewer.
        others = np.setdiff1d(draw.integers(n_further * (length - 1), size=2 * EXAMPLES), own)
        others = draw.permutation(others)[: len(firing)]
        both = np.concatenate([firing, others])
        fires = np.arange(len(both)) < len(firing)
        mixed = draw.permutation(len(both))
        parts.append(pd.DataFrame({"feature": one, "at": both[mixed], "fires": fires[mixed]}))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"feature": [], "at": [], "fires": []})
    columns = {
        "feature": table["feature"].astype(np.int32),
        "context": (table["at"] // (length - 1) + further._first).astype(np.int32),
        "position": (table["at"] % (length - 1) + 1).astype(np.int16),
        "fires": table["fires"].astype(bool),
    }
    table = pd.DataFrame(columns)
    return table[table.groupby("feature")["fires"].transform("nunique") == 2].reset_index(drop=True)


def score_descriptions(
    features: pd.DataFrame, detection: pd.DataFrame, contexts: Int[Tensor, "context pos"], kinds: TokenKinds
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What each description's rule says of its examples, and how well it tells.

    Returns:
        Columns score and shuffled of `detection`: of the rule, and of the rule of the feature next in frequency. And a
        row per feature: description_accuracy, its _se, description_auroc, its _se, and both _shuffled; nan where it has
        no examples.
    """
    of_feature = rules(features)
    scored = features[features["feature"].isin(detection["feature"])].sort_values("firings", kind="stable")
    next_in_density = dict(zip(scored["feature"], np.roll(scored["feature"], 1), strict=True))
    one, position = detection["feature"].to_numpy(), detection["position"].to_numpy()
    scores = np.zeros((2, len(detection)), dtype=np.float32)
    for context, rows in detection.groupby("context").indices.items():
        tokens = contexts[context]
        slots, ids = dfa.source_slots(tokens, kinds).numpy(), tokens.numpy()
        for row in rows:
            q = int(position[row])
            for i, feature in enumerate((one[row], next_in_density[one[row]])):
                scores[i, row] = of_feature[feature].score(ids[: q + 1], slots[q, : q + 1])
    fires, context = detection["fires"].to_numpy(), detection["context"].to_numpy()
    found = {}
    for feature, rows in detection.groupby("feature").indices.items():
        own, other = (detected(fires[rows], each[rows], context[rows]) for each in scores)
        found[feature] = (*own, other.accuracy, other.auroc)
    columns = [f"description_{name}" for name in (*Detected._fields, "accuracy_shuffled", "auroc_shuffled")]
    figures = pd.DataFrame.from_dict(found, orient="index", columns=columns, dtype=float).reindex(features.index)
    return detection.assign(score=scores[0], shuffled=scores[1]), figures
