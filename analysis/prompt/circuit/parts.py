"""Nodes of a prompt's circuit with what each gives to some reading, as columns of tensors."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

KINDS = ("feature", "error", "bias", "output bias", "mlp", "embedding", "key bias", "query bias")


class Parts(NamedTuple):
    """Nodes and what each gives to some reading; ids are -1 where a node has none."""

    row: Int[Tensor, " part"]
    """the reading"""
    kind: Int[Tensor, " part"]
    """index into KINDS"""
    layer: Int[Tensor, " part"]
    head: Int[Tensor, " part"]
    feature: Int[Tensor, " part"]
    """global id of the layer's SAE"""
    position: Int[Tensor, " part"]
    """where it was written, which is where it is read"""
    activation: Float[Tensor, " part"]
    """of a feature"""
    value: Float[Tensor, " part"]

    @classmethod
    def rest(cls, kind: str, layers: Int[Tensor, " layer"], at: Int[Tensor, " row"], value: Tensor) -> "Parts":
        """Errors and biases of each head, value [layer, row, head], or what belongs to no head, value [layer, row]."""
        of_heads = value if value.dim() == 3 else value[..., None]
        index = torch.ones_like(of_heads, dtype=torch.bool).nonzero()  # [part, 3]
        layer, row, head = index.unbind(1)
        none = torch.full_like(row, -1)
        ids = (row, torch.full_like(row, KINDS.index(kind)), layers[layer], head if value.dim() == 3 else none, none)
        return cls(*ids, at[row], torch.full_like(value.flatten(), torch.nan), value.flatten())

    @classmethod
    def joined(cls, parts: list["Parts"]) -> "Parts":
        """One after the other."""
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def only(self, some: Tensor) -> "Parts":
        """Those of a mask or of indices."""
        return Parts(*(column[some] for column in self))

    def above(self, share: float) -> "Parts":
        """Those of at least a share of the largest."""
        size = self.value.abs()
        return self.only((size > 0) & (size >= share * size.max()))

    def of_class(self) -> tuple[Int[Tensor, " part"], Int[Tensor, " class"]]:
        """What is one node at all positions: the class of each part, and a part of each class."""
        code = self.kind
        for ids in (self.layer, self.head, self.feature):
            code = code * (ids.max() + 2) + ids + 1
        _, of_part = torch.unique(code, return_inverse=True)
        example = of_part.new_zeros(int(of_part.max()) + 1)
        example[of_part] = torch.arange(len(of_part), device=of_part.device)
        return of_part, example

    def sums(self, rows: int) -> Float[Tensor, " row"]:
        """Of each reading."""
        return self.value.new_zeros(rows).index_add_(0, self.row, self.value)

    def table(self) -> pd.DataFrame:
        """As a table, with the names of kinds."""
        columns = {name: column.cpu().numpy() for name, column in self._asdict().items()}
        return pd.DataFrame({**columns, "kind": np.array(KINDS, dtype=object)[columns["kind"]]})
