"""The mean attention pattern of every head, as small as a thumbnail."""

from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.attribution import Chunk
from analysis.picture import in_bytes
from analysis.schema import PATTERN_CELLS


class MeanPattern:
    """Attention of every head, a mean over contexts, each weighing the same.

    The first row and column are BOS, every other one is a cell of `step` positions in a row (the last may have fewer).
    What stands there is the attention that a destination of the row's cell gives to all sources of the column's cell
    together, a mean over those destinations: rows sum to 1, and with a step of 1 nothing is pooled.

    Args:
        positions: of a context that are looked at, from BOS on.
        cells: rows and columns at most.
    """

    def __init__(self, n_heads: int, positions: int, cells: int = PATTERN_CELLS) -> None:
        self._step = -(-(positions - 1) // (cells - 1)) or 1
        cell = (torch.arange(positions) + self._step - 1) // self._step  # of each position; BOS is alone in the first
        self._holds = torch.nn.functional.one_hot(cell).float().T  # [cell, pos]
        self.n_contexts = torch.tensor(0)
        self.total = torch.zeros(n_heads, len(self._holds), len(self._holds), dtype=torch.float64)

    @torch.no_grad()
    def update(self, batch: list[Chunk]) -> None:
        """Add the contexts of a forward."""
        for chunk in batch:
            sources = self._holds.to(chunk.pattern.device)
            queries, n = sources / sources.sum(1, keepdim=True), sources.shape[1]
            pattern = chunk.pattern[:, :, :n, :n].sum(0)  # [head, query, source]
            self.total += (queries @ pattern @ sources.T).double().cpu()
            self.n_contexts += len(chunk.pattern)

    def absorb(self, other: "MeanPattern") -> None:
        """Add the contexts of another."""
        self.total += other.total
        self.n_contexts += other.n_contexts

    def mean(self) -> Float[Tensor, "head cell cell"]:
        """[head, cell of destinations, cell of sources]"""
        return self.total / self.n_contexts

    def described(self) -> dict[str, Any]:
        """As `schema.MeanPatternMeta` has it."""
        return {"contexts": int(self.n_contexts), "cells": len(self._holds), "step": self._step}


def pattern_table(text: MeanPattern, repeated: MeanPattern) -> pd.DataFrame:
    """One row per head: `text` and `repeated`, the values of a `Picture`.

    A byte is round(127 sqrt(attention)), so attention is (byte / 127)**2, off by at most about sqrt(attention) / 127:
    attention that is spread evenly is small, and would vanish in steps of equal size.
    """
    columns = {
        name: [in_bytes(of_head.sqrt(), 1.0) for of_head in of.mean()]
        for name, of in (("text", text), ("repeated", repeated))
    }
    return pd.DataFrame({"head": range(len(text.total)), **columns})
