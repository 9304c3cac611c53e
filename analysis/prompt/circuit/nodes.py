"""The nodes of a prompt's circuit, and what each of them wrote: features of heads, and all the rest.

The residual stream is the embedding plus, of every layer, each active feature (f W_dec W_O), what the SAE of the layer
leaves out of each head's z (error), its decoder bias, the output bias and the MLP. Errors, biases and MLPs are the
rest: they are shown and never dropped, so that every sum is whole. A layer without an SAE is all error, and so is BOS,
which an SAE is not for.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.block_diag import BlockDiagSAE
from trainer.config import require

if TYPE_CHECKING:  # it imports transformer_lens, for which pages that run no prompt should not wait
    from trainer.model.frozen import Frozen, Reading

KINDS = ("feature", "error", "bias", "output bias", "mlp", "embedding")


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
    def of(
        cls,
        kind: str,
        layer: int,
        row: Int[Tensor, " part"],
        at: Int[Tensor, " row"],
        value: Float[Tensor, " part"],
        head: Int[Tensor, " part"] | None = None,
        feature: Int[Tensor, " part"] | None = None,
        activation: Float[Tensor, " part"] | None = None,
    ) -> "Parts":
        """Those of one kind and layer."""
        none = torch.full_like(row, -1)
        unknown = torch.full_like(value, torch.nan) if activation is None else activation
        ids = torch.full_like(row, KINDS.index(kind)), torch.full_like(row, layer)
        of_head = none if head is None else head
        return cls(row, *ids, of_head, none if feature is None else feature, at[row], unknown, value)

    @classmethod
    def joined(cls, parts: list["Parts"]) -> "Parts":
        """One after the other."""
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

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
        return pd.DataFrame({**columns, "kind": np.array(KINDS)[columns["kind"]]})


class Encoded(NamedTuple):
    """z of one layer as its SAE has it: active features as a list, and what is left."""

    position: Int[Tensor, " firing"]
    """ascending"""
    block: Int[Tensor, " firing"]
    feature: Int[Tensor, " firing"]
    """within the block"""
    activation: Float[Tensor, " firing"]
    error: Float[Tensor, "pos head d_head"]
    bias: Float[Tensor, "pos head d_head"]
    """b_dec, but at BOS"""


class Nodes:
    """A prompt's forward with the SAEs of some layers.

    Args:
        saes: by layer.

    Raises:
        ValueError: an SAE is of other sizes than the model's.
    """

    def __init__(self, frozen: "Frozen", saes: Mapping[int, BlockDiagSAE]) -> None:
        lm = frozen.lm
        self.frozen, self.n_layers, self.n_heads = frozen, lm.n_layers, lm.n_heads
        for layer, sae in saes.items():
            require(0 <= layer < lm.n_layers, f"{lm.name} has no layer {layer}")
            require(sae.d_in == lm.n_heads * lm.d_head, f"the SAE of layer {layer} is not of {lm.name}'s sizes")
        self.saes = {layer: sae.to(lm.device, frozen.dtype) for layer, sae in saes.items()}
        self.encoded = [encode(frozen.layers[layer].z, self.saes.get(layer)) for layer in range(lm.n_layers)]

    def firing(self, position: int) -> list[tuple[int, int, int]]:
        """Layer, head and id of every feature that fires at a position, the last layers first."""
        found = []
        for layer, sae in sorted(self.saes.items(), reverse=True):
            here = self.encoded[layer].position == position
            block, feature = self.encoded[layer].block[here], self.encoded[layer].feature[here]
            head = _head(sae, block, sae.W_dec.detach()[block, feature], self.n_heads).tolist()
            ids = (block * sae.features_per_block + feature).tolist()
            found += [(layer, *each) for each in zip(head, ids, strict=True)]
        return found

    def split(self, reading: "Reading", at: Int[Tensor, " row"], below: int) -> Parts:
        """What every node written before layer `below` gives to each reading of the residual stream at a position.

        Their values sum to direction . stream.
        """
        parts = [_rest("embedding", -1, at, _dot(self.frozen.embedding[at], reading.direction)[:, None])]
        for layer in range(below):
            heads = self.frozen.layers[layer]
            # What a head writes, read along the direction, is z . u.
            u = torch.einsum("hdm,nm->nhd", self.frozen.W_O(layer), reading.direction)
            u = u / heads.write_scale[at][:, None, None]  # [row, head, d_head]
            parts += self._of_heads(layer, u, at)
            whole = _dot(heads.attention[at], reading.direction)
            parts.append(_rest("output bias", layer, at, (whole - _dot(heads.z[at], u).sum(1))[:, None]))
            parts.append(_rest("mlp", layer, at, _dot(heads.mlp[at], reading.direction)[:, None]))
        return Parts.joined(parts)

    def of_z(self, g: list[Float[Tensor, "pos head d_head"]]) -> Parts:
        """z . g of every head and position of the first layers over features, errors and biases; a row per position."""
        parts = []
        for layer in range(len(g)):
            parts += self._of_heads(layer, g[layer], torch.arange(len(g[layer]), device=g[layer].device))
        return Parts.joined(parts)

    def _of_heads(self, layer: int, u: Float[Tensor, "row head d_head"], at: Int[Tensor, " row"]) -> list[Parts]:
        """z . u of a layer where each row reads, over features, errors and biases."""
        encoded = self.encoded[layer]
        parts = [
            _features(layer, encoded, self.saes.get(layer), u, at),
            _rest("error", layer, at, _dot(encoded.error[at], u)),
        ]
        return [*parts, _rest("bias", layer, at, _dot(encoded.bias[at], u))] if layer in self.saes else parts

    def vector(self, kind: str, layer: int, head: int, feature: int, position: int) -> Float[Tensor, " d_model"]:
        """What a node wrote to the residual stream."""
        frozen = self.frozen
        if kind == "embedding":
            return frozen.embedding[position]
        heads = frozen.layers[layer]
        if kind == "mlp":
            return heads.mlp[position]
        z = heads.z[position] if kind == "output bias" else self.written(kind, layer, head, feature, position)
        written = torch.einsum("hd,hdm->m", z, frozen.W_O(layer)) / heads.write_scale[position]
        return heads.attention[position] - written if kind == "output bias" else written

    def written(self, kind: str, layer: int, head: int, feature: int, position: int) -> Float[Tensor, "head d_head"]:
        """What a node of a layer's heads is of z at its position.

        Raises:
            ValueError: it is none of those.
        """
        encoded = self.encoded[layer]
        if kind == "feature":
            sae = self.saes[layer]
            block, index = divmod(feature, sae.features_per_block)
            here = (encoded.position == position) & (encoded.block == block) & (encoded.feature == index)
            part = sae.W_dec.new_zeros(sae.n_blocks, sae.width)
            part[block] = encoded.activation[here].sum() * sae.W_dec.detach()[block, index]
            return part.view(self.n_heads, -1)
        require(kind in ("error", "bias"), f"{kind} is no part of z")
        part = torch.zeros_like(encoded.error[position])
        part[head] = (encoded.error if kind == "error" else encoded.bias)[position, head]
        return part


@torch.no_grad()
def encode(z: Float[Tensor, "pos head d_head"], sae: BlockDiagSAE | None) -> Encoded:
    """One layer's z as features and rest."""
    if sae is None:
        none = torch.empty(0, dtype=torch.long, device=z.device)
        return Encoded(none, none, none, z.new_empty(0), z, torch.zeros_like(z))
    f = sae.encode(z)
    f[0] = 0
    position, block, index = f.nonzero().unbind(1)
    bias = sae.b_dec.detach().view(z.shape[1:]).expand_as(z).clone()
    bias[0] = 0
    error = z - (sae.decode(f) - sae.b_dec).view_as(z) - bias
    return Encoded(position, block, index, f[position, block, index], error, bias)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _features(
    layer: int,
    encoded: Encoded,
    sae: BlockDiagSAE | None,
    u: Float[Tensor, "row head d_head"],
    at: Int[Tensor, " row"],
) -> "Parts":
    """f (W_dec . u) of the features active where each row reads."""
    if sae is None:
        return Parts.of("feature", layer, at[:0], at, u.new_empty(0))
    first = torch.searchsorted(encoded.position, at)  # firings are in the order of positions
    n = torch.searchsorted(encoded.position, at, right=True) - first
    row = torch.arange(len(at), device=at.device).repeat_interleave(n)
    firing = torch.arange(len(row), device=at.device) + (first - (n.cumsum(0) - n))[row]
    block, index, activation = (column[firing] for column in (encoded.block, encoded.feature, encoded.activation))
    decoder = sae.W_dec.detach()[block, index]
    value = activation * _dot(decoder, u.reshape(len(u), sae.n_blocks, -1)[row, block])
    head = _head(sae, block, decoder, u.shape[1])
    return Parts.of("feature", layer, row, at, value, head, block * sae.features_per_block + index, activation)


def _head(
    sae: BlockDiagSAE, block: Int[Tensor, " feature"], decoder: Float[Tensor, "feature width"], n_heads: int
) -> Int[Tensor, " feature"]:
    """Of features; of a dense SAE's the head that each writes to most."""
    return decoder.view(len(decoder), n_heads, -1).norm(dim=-1).argmax(-1) if sae.is_dense else block


def _rest(kind: str, layer: int, at: Int[Tensor, " row"], value: Float[Tensor, "row head"]) -> "Parts":
    """A node per row and head; of one column, which belongs to no head, one per row."""
    rows, heads = (torch.arange(n, device=value.device) for n in value.shape)
    head = heads.repeat(len(rows)) if kind in ("error", "bias") else None
    return Parts.of(kind, layer, rows.repeat_interleave(len(heads)), at, value.flatten(), head)
