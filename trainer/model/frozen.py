"""One forward of a prompt, taken apart: with its norms' scales and its attention as they were, all else is linear.

The residual stream that enters a layer is the sum of the embedding and of what every earlier layer's heads and MLP
wrote. What a head reads of it (a value, a key or a query, along some direction) is one dot product with that sum, so
it splits exactly over whoever wrote.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformerKeyValueCache

from trainer.config import require
from trainer.model.lm import LanguageModel

Side = Literal["Q", "K", "V"]


class Heads(NamedTuple):
    """What one attention layer did, and what was written there; position 0 is BOS."""

    z: Float[Tensor, "pos head d_head"]
    q: Float[Tensor, "pos head d_head"]
    """after rotation, where the model rotates"""
    k: Float[Tensor, "pos head d_head"]
    """likewise, of each query head"""
    pattern: Float[Tensor, "head query source"]
    read_scale: Float[Tensor, " pos"]
    """what the norm before the layer divides by"""
    write_scale: Float[Tensor, " pos"]
    """what a norm after it divides by; 1 without one"""
    attention: Float[Tensor, "pos d_model"]
    """written by all heads and the output bias"""
    mlp: Float[Tensor, "pos d_model"]


class Reading(NamedTuple):
    """Something read of the residual stream, as a dot product with it and what is added."""

    direction: Float[Tensor, "reading d_model"]
    constant: Float[Tensor, " reading"]


class Frozen:
    """A forward of one prompt through every layer.

    Args:
        tokens: BOS first.

    Raises:
        ValueError: keys and queries of the model are no linear function of the residual stream, or positions are told
            otherwise than by rotation or embedding.
    """

    def __init__(self, lm: LanguageModel, tokens: Int[Tensor, " pos"]) -> None:
        cfg = lm.model.cfg
        positions = cfg.positional_embedding_type
        require(positions in ("standard", "rotary"), f"{lm.name} has {positions} positions: its keys cannot be split")
        require(not cfg.use_qk_norm, f"{lm.name} normalises queries and keys: they cannot be split")
        self.lm, self.tokens = lm, tokens
        self._past = lm.no_past(1)
        got = lm.capture(tokens[None], _names(lm), past=self._past)
        self.dtype = torch.promote_types(cfg.dtype, torch.float32)  # sums are exact to this
        got = {name: value[0].to(self.dtype) for name, value in got.items()}
        self.embedding: Float[Tensor, "pos d_model"] = got["blocks.0.hook_resid_pre"]
        self.final: Float[Tensor, "pos d_model"] = got[lm.final_hook]
        self.layers = [_heads(got, f"blocks.{layer}.", cfg) for layer in range(lm.n_layers)]

    def entering(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """The residual stream that enters a layer, as the sum of what was written; before the final norm, after all."""
        written = [part for heads in self.layers[:layer] for part in (heads.attention, heads.mlp)]
        return torch.stack([self.embedding, *written]).sum(0)

    def before(self, position: int, runs: int) -> HookedTransformerKeyValueCache:
        """What came before a position, for runs from there on (`LanguageModel.capture`), which add nothing to it."""
        past = self.lm.no_past(runs)
        for entry, whole in zip(past.entries, self._past.entries, strict=True):
            entry.past_keys = whole.past_keys[:, :position].expand(runs, -1, -1, -1)
            entry.past_values = whole.past_values[:, :position].expand(runs, -1, -1, -1)
        past.freeze()
        return past

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """What each head writes per unit of z, times its position's `write_scale`."""
        return self.lm.layer(layer).W_O.to(self.dtype)

    def read(
        self,
        layer: int,
        side: Side,
        head: int,
        along: Float[Tensor, "reading d_head"],
        at: Int[Tensor, " reading"],
    ) -> Reading:
        """Of the query, key or value (before rotation) of a head at a position the component `along` a vector."""
        block: Any = self.lm.model.blocks[layer]
        weight, bias = (getattr(block.attn, f"{name}_{side}")[head].detach().to(self.dtype) for name in "Wb")
        direction, constant = along @ weight.T, along @ bias
        norm: Any = block.ln1
        if hasattr(norm, "b"):
            constant = constant + direction @ norm.b.detach().to(self.dtype)
        if hasattr(norm, "w"):
            direction = direction * norm.w.detach().to(self.dtype)
        if (self.lm.model.cfg.normalization_type or "").startswith("LN"):
            direction = direction - direction.mean(-1, keepdim=True)
        return Reading(direction / self.layers[layer].read_scale[at][:, None], constant)

    def unrotated(
        self, layer: int, vector: Float[Tensor, "reading d_head"], at: Int[Tensor, " reading"]
    ) -> Float[Tensor, "reading d_head"]:
        """The vector whose product with a key or query before rotation is that of `vector` with it after, at `at`."""
        rotation = self._rotation(layer)
        return vector if rotation is None else torch.einsum("inj,nj->ni", rotation[:, at], vector)

    def projected(
        self, layer: int, side: Side, head: int, vectors: Float[Tensor, "node d_model"], at: int
    ) -> Float[Tensor, "node d_head"]:
        """What parts of the residual stream at a position become in a head's query or key, rotated there; no bias."""
        unit = torch.eye(self.lm.d_head, dtype=self.dtype, device=vectors.device)
        where = torch.full((len(unit),), at, device=vectors.device)
        found = vectors @ self.read(layer, side, head, unit, where).direction.T
        rotation = self._rotation(layer)
        return found if rotation is None else found @ rotation[:, at]

    def _rotation(self, layer: int) -> Float[Tensor, "d_head pos d_head"] | None:
        """Before rotation to after it, at every position; None in a model that does not rotate."""
        if self.lm.model.cfg.positional_embedding_type != "rotary":
            return None
        attn: Any = self.lm.model.blocks[layer].attn
        unit = torch.eye(self.lm.d_head, dtype=self.dtype, device=self.final.device)
        basis = unit[:, None, None].expand(-1, len(self.tokens), 1, -1)
        return attn.apply_rotary(basis.to(attn.rotary_sin.dtype))[:, :, 0].to(self.dtype)

    def score_scale(self, layer: int) -> float:
        """What the product of query and key is divided by."""
        attn: Any = self.lm.model.blocks[layer].attn
        return float(attn.attn_scale)


def _names(lm: LanguageModel) -> list[str]:
    """Hooks in the order in which they fire, the last one last."""
    points, names = lm.model.hook_dict, []
    rotates = lm.model.cfg.positional_embedding_type == "rotary"
    for layer in range(lm.n_layers):
        of_block = ["hook_resid_pre"] if layer == 0 else []
        turned = "attn.hook_rot_" if rotates else "attn.hook_"
        of_block += ["ln1.hook_scale", f"{turned}q", f"{turned}k", "attn.hook_pattern", "attn.hook_z"]
        of_block += ["ln1_post.hook_scale", "hook_attn_out", "hook_mlp_out"]
        names += [name for each in of_block if (name := f"blocks.{layer}.{each}") in points]
    return [*names, lm.final_hook]


def _heads(got: dict[str, Tensor], block: str, cfg: Any) -> Heads:
    attention = got[f"{block}hook_attn_out"]
    ones = torch.ones_like(attention[:, :1])
    turned = f"{block}attn.hook_{'rot_' if cfg.positional_embedding_type == 'rotary' else ''}"
    q, k = got[f"{turned}q"], got[f"{turned}k"]
    return Heads(
        z=got[f"{block}attn.hook_z"],
        q=q,
        k=k.repeat_interleave(q.shape[1] // k.shape[1], dim=1),  # grouped-query attention
        pattern=got[f"{block}attn.hook_pattern"],
        read_scale=got.get(f"{block}ln1.hook_scale", ones)[:, 0],
        write_scale=got.get(f"{block}ln1_post.hook_scale", ones)[:, 0],
        attention=attention,
        mlp=got.get(f"{block}hook_mlp_out", torch.zeros_like(attention)),
    )
