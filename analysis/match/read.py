"""Reads what `python -m analysis.match` wrote, and aligns two runs of one prompt by it."""

import os
import shlex
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import schema
from analysis.prompt.run import PromptRun
from analysis.store import Artefacts
from trainer.checkpoint import Checkpoint, CheckpointError


class Match:
    """The matched features of two checkpoints, whichever of them was named first when they were matched.

    `a` and `b` are theirs in the frames: `first` and `second`, but where one is dense it is `a`.

    Args:
        first, second: which of them is `a` where both are block diagonal, or dense.

    Raises:
        CheckpointError: as `Artefacts`.
    """

    def __init__(self, first: Checkpoint, second: Checkpoint) -> None:
        orders = [(first, second), (second, first)]
        self.a, self.b = next(
            (order for order in orders if os.path.exists(match_folder(*order) / "meta.json")), orders[0]
        )
        self._command = command = f"python -m analysis.match {shlex.join([str(first.path), str(second.path)])}"
        absent = f"{first.name} and {second.name} have not been matched yet"
        expected = schema.of_match(self.a, self.b)
        files = Artefacts(match_folder(self.a, self.b), [self.a, self.b], expected, command, absent)
        self.folder, self.meta, self.table = files.folder, files.meta, files.table
        self.kind = "one-to-one" if first.is_dense == second.is_dense else "split"
        self._swapped = self.kind == "one-to-one" and self.a is not first
        if self._swapped:
            self.a, self.b = first, second

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """Pairs, or the parts of dense features: columns of `analysis.match.score.Tables.pairs`."""
        table = self.table("pairs")
        return table.rename(columns={"a": "b", "b": "a"}) if self._swapped else table

    @cached_property
    def features(self) -> pd.DataFrame:
        """Every feature that fires, of either side: columns of `analysis.match.score.Tables.features`."""
        table = self.table("features")
        table = table.assign(side=table["side"].map({"a": "b", "b": "a"})) if self._swapped else table
        for side, checkpoint in (("a", self.a), ("b", self.b)):
            if (table.loc[table["side"] == side, "feature"] >= checkpoint.config.sae.d_sae).any():
                raise CheckpointError(f"{self.folder}/features.parquet is damaged (no such feature)", self._command)
        return table

    def of_side(self, side: str) -> pd.DataFrame:
        """The features of `a` or `b` that fire often enough to be judged; the index is the feature id."""
        table = self.features
        kept = (table["side"] == side) & (table["firings"] >= self.meta["min_firings"])
        return table[kept].set_index("feature", drop=False)

    def alone(self, side: str) -> pd.DataFrame:
        """Features of `a` or `b` that fire often enough, but have no partner, are no part or have no parts."""
        table = self.of_side(side)
        return table[table["partner"] < 0 if self.kind == "one-to-one" else table["parts"] == 0]

    def per_head(self) -> pd.DataFrame:
        """head, side, found (in both or only in one), features: how many features of each head are in both."""
        rows = []
        for side in "ab":
            alone = self.alone(side)["head"]
            for head, total in self.of_side(side)["head"].value_counts().sort_index().items():
                only = int((alone == head).sum())
                rows += [(head, side, "both", total - only), (head, side, "one", only)]
        return pd.DataFrame(rows, columns=["head", "side", "found", "features"])


def difference(first: Checkpoint, second: Checkpoint) -> str | None:
    """In what two checkpoints differ so that their features cannot be matched; None where they can."""
    for key, what in (("fingerprint", "model"), ("hook_layer", "layer"), ("processing", "processing of the model")):
        ours, theirs = (getattr(one.config.model, key) for one in (first, second))
        if ours != theirs:
            return f"{what} ({ours} and {theirs})"
    return None


def match_folder(first: Checkpoint, second: Checkpoint) -> Path:
    """Where a match of two checkpoints lies, if they were matched in this order."""
    return first.path / "matches" / second.name


def activations(run: PromptRun, position: int | None) -> np.ndarray:
    """Activation of every feature at a position of a prompt, or its largest at any but BOS."""
    f = run.f.flatten(1)
    return (f[1:].amax(0) if position is None else f[position]).numpy()


def aligned(match: Match, a: PromptRun, b: PromptRun, position: int | None, firing: bool = True) -> pd.DataFrame:
    """Pairs with the activation of either feature on a prompt, head by head, the strongest first.

    Args:
        position: where; None: anywhere on the prompt.
        firing: only pairs of which one fires there.
    """
    table = match.pairs.copy()
    table["activation_a"] = activations(a, position)[table["a"]]
    table["activation_b"] = activations(b, position)[table["b"]]
    largest = table[["activation_a", "activation_b"]].max(axis=1)
    if firing:
        table, largest = table[largest > 0], largest[largest > 0]
    return _by_head(table.assign(largest=largest), ["largest", "score"]).drop(columns="largest")


def only_in(match: Match, side: str, run: PromptRun, position: int | None, firing: bool = True) -> pd.DataFrame:
    """Features without a partner with their activation on a prompt, head by head, the strongest first."""
    table = match.alone(side).reset_index(drop=True)
    table["activation"] = activations(run, position)[table["feature"]]
    return _by_head(table[table["activation"] > 0] if firing else table, ["activation", "firings"])


def split_on(match: Match, dense: PromptRun, position: int | None, firing: bool = True) -> pd.DataFrame:
    """Dense features that have parts, with their activation on a prompt, the strongest first."""
    table = match.of_side("a").reset_index(drop=True)
    table["activation"] = activations(dense, position)[table["feature"]]
    table = table[(table["parts"] > 0) & (~np.array(firing) | (table["activation"] > 0))]
    return table.sort_values(["activation", "firings"], ascending=False, kind="stable", ignore_index=True)


def parts_of(match: Match, feature: int, block: PromptRun, position: int | None) -> pd.DataFrame:
    """Block features that a dense feature splits into, the best first, with their activation on a prompt."""
    table = match.pairs[match.pairs["a"] == feature].sort_values("score", ascending=False, ignore_index=True)
    return table.assign(activation_b=activations(block, position)[table["b"]])


def over_tokens(runs: list[tuple[str, PromptRun, int]]) -> pd.DataFrame:
    """Activations along a prompt: feature (its given name), position, token, activation; without BOS."""
    parts = []
    for name, run, feature in runs:
        along = run.f.flatten(1)[1:, feature].numpy()
        positions = range(1, len(along) + 1)
        tokens = [run.labels[position] for position in positions]
        parts.append(pd.DataFrame({"feature": name, "position": positions, "token": tokens, "activation": along}))
    return pd.concat(parts, ignore_index=True)


def _by_head(table: pd.DataFrame, strength: list[str]) -> pd.DataFrame:
    order = [True, *(False for _ in strength)]
    return table.sort_values(["head", *strength], ascending=order, kind="stable", ignore_index=True)
