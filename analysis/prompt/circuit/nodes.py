"""The nodes of a prompt's circuit, and what each of them wrote: features of heads, and all the rest.

The residual stream is the embedding plus, of every layer, each active feature (f W_dec W_O), what the SAE of the layer
leaves out of each head's z (error), its decoder bias, the output bias and the MLP. Errors, biases and MLPs are the
rest: they are shown and never dropped, so that every sum is whole. A layer without an SAE is all error, and so is BOS,
which an SAE is not for.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis.prompt.circuit.parts import KINDS, Parts
from trainer.block_diag import BlockDiagSAE
from trainer.config import require

if TYPE_CHECKING:  # it imports transformer_lens, for which pages that run no prompt should not wait
    from trainer.model.frozen import Frozen, Reading


class Firing(NamedTuple):
    """Features that fire, in the order of layers and then of positions."""

    layer: Int[Tensor, " firing"]
    position: Int[Tensor, " firing"]
    block: Int[Tensor, " firing"]
    in_block: Int[Tensor, " firing"]
    """index within the block"""
    head: Int[Tensor, " firing"]
    """of a dense SAE's feature the one that it writes to most"""
    feature: Int[Tensor, " firing"]
    """global id of the layer's SAE"""
    activation: Float[Tensor, " firing"]


class Nodes:
    """A prompt's forward with the SAEs of some layers.

    Args:
        saes: by layer.

    Raises:
        ValueError: an SAE is of other sizes than the model's.
    """

    firing: Firing
    error: Float[Tensor, "layer pos head d_head"]
    bias: Float[Tensor, "layer pos head d_head"]
    """b_dec, but at BOS"""

    def __init__(self, frozen: "Frozen", saes: Mapping[int, BlockDiagSAE]) -> None:
        lm = frozen.lm
        self.frozen, self.n_layers, self.n_heads = frozen, lm.n_layers, lm.n_heads
        for layer, sae in saes.items():
            require(0 <= layer < lm.n_layers, f"{lm.name} has no layer {layer}")
            require(sae.d_in == lm.n_heads * lm.d_head, f"the SAE of layer {layer} is not of {lm.name}'s sizes")
        self.saes = {layer: sae.to(lm.device, frozen.dtype) for layer, sae in sorted(saes.items())}
        self._z, self._attention, self._mlp = (
            torch.stack([getattr(heads, name) for heads in frozen.layers]) for name in ("z", "attention", "mlp")
        )  # [layer, pos, ...]
        self._encode()

    @torch.no_grad()
    def _encode(self) -> None:
        self.error, self.bias = self._z.clone(), torch.zeros_like(self._z)
        none = torch.empty(0, dtype=torch.long, device=self._z.device)
        found = [Firing(none, none, none, none, none, none, self._z.new_empty(0))]
        for layer, sae in self.saes.items():
            z = self._z[layer]
            f = sae.encode(z)
            f[0] = 0
            position, block, index = f.nonzero().unbind(1)
            head = block
            if sae.is_dense:
                head = sae.W_dec[block, index].view(len(block), self.n_heads, -1).norm(dim=-1).argmax(-1)
            ids = (torch.full_like(block, layer), position, block, index, head, block * sae.features_per_block + index)
            found.append(Firing(*ids, f[position, block, index]))
            self.bias[layer, 1:] = sae.b_dec.view(z.shape[1:])
            self.error[layer] -= (sae.decode(f) - sae.b_dec).view_as(z) + self.bias[layer]
        self.firing = Firing(*(torch.cat(columns) for columns in zip(*found, strict=True)))
        place = self.firing.layer * len(self.frozen.tokens) + self.firing.position
        n = torch.bincount(place, minlength=self.n_layers * len(self.frozen.tokens))
        self._n_firing = n.view(self.n_layers, -1)  # [layer, pos]
        self._first_firing = (n.cumsum(0) - n).view(self.n_layers, -1)

    def here(self, layer: int, position: int) -> Firing:
        """The features of a layer that fire at a position."""
        first = int(self._first_firing[layer, position])
        last = first + int(self._n_firing[layer, position])
        return Firing(*(column[first:last] for column in self.firing))

    def split(self, reading: "Reading", at: Int[Tensor, " row"], below: int) -> Parts:
        """What every node written before layer `below` gives to each reading of the residual stream at a position.

        Their values sum to direction . stream.
        """
        frozen, layers = self.frozen, torch.arange(below, device=at.device)
        embedding = _dot(frozen.embedding[at], reading.direction)[None]
        ground = Parts.rest("embedding", layers.new_tensor([-1]), at, embedding)
        if not below:
            return ground
        # What a head writes, read along the direction, is z . u.
        u = torch.stack([torch.einsum("hdm,nm->nhd", frozen.W_O(layer), reading.direction) for layer in range(below)])
        u /= torch.stack([heads.write_scale[at] for heads in frozen.layers[:below]])[..., None, None]
        written, mlp = (_dot(whole[:below, at], reading.direction) for whole in (self._attention, self._mlp))
        output_bias = written - _dot(self._z[:below, at], u).sum(-1)
        rest = Parts.rest("output bias", layers, at, output_bias), Parts.rest("mlp", layers, at, mlp)
        return Parts.joined([ground, *self._of_heads(u, at), *rest])

    def of_z(self, g: list[Float[Tensor, "pos head d_head"]]) -> Parts:
        """z . g of every head and position of the first layers over features, errors and biases; a row per position."""
        return Parts.joined(self._of_heads(torch.stack(g), torch.arange(len(self.frozen.tokens), device=g[0].device)))

    def _of_heads(self, u: Float[Tensor, "layer row head d_head"], at: Int[Tensor, " row"]) -> list[Parts]:
        """z . u of the first layers where each row reads, over features, errors and biases."""
        layers = torch.arange(len(u), device=u.device)
        error = Parts.rest("error", layers, at, _dot(self.error[: len(u), at], u))
        with_sae = torch.tensor([layer for layer in self.saes if layer < len(u)], device=u.device, dtype=torch.long)
        bias = Parts.rest("bias", with_sae, at, _dot(self.bias[with_sae][:, at], u[with_sae]))
        return [self._of_features(u, at), error, bias]

    def _of_features(self, u: Float[Tensor, "layer row head d_head"], at: Int[Tensor, " row"]) -> Parts:
        """f (W_dec . u) of the features active where each row reads."""
        n = self._n_firing[: len(u), at]  # [layer, row]
        place = torch.arange(n.numel(), device=u.device).repeat_interleave(n.flatten())
        first = self._first_firing[: len(u), at].flatten() - (n.flatten().cumsum(0) - n.flatten())
        which = torch.arange(len(place), device=u.device) + first[place]
        row, (layer, _, block, index, head, feature, activation) = place % len(at), (c[which] for c in self.firing)
        value, end = torch.empty_like(activation), n.sum(1).cumsum(0).tolist()
        for of_layer, sae in self.saes.items():
            if of_layer < len(u):
                some = slice(end[of_layer] - int(n[of_layer].sum()), end[of_layer])
                decoder = sae.W_dec.detach()[block[some], index[some]]
                value[some] = _dot(decoder, u[of_layer].reshape(len(at), sae.n_blocks, -1)[row[some], block[some]])
        kind = torch.full_like(row, KINDS.index("feature"))
        return Parts(row, kind, layer, head, feature, at[row], activation, activation * value)

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
        if kind == "feature":
            sae, here = self.saes[layer], self.here(layer, position)
            block, index = divmod(feature, sae.features_per_block)
            part = sae.W_dec.new_zeros(sae.n_blocks, sae.width)
            part[block] = here.activation[here.feature == feature].sum() * sae.W_dec.detach()[block, index]
            return part.view(self.n_heads, -1)
        require(kind in ("error", "bias"), f"{kind} is no part of z")
        part = torch.zeros_like(self.error[layer, position])
        part[head] = (self.error if kind == "error" else self.bias)[layer, position, head]
        return part


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
