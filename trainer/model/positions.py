"""Masks and rotary tables of a TransformerLens model, for as many positions as are needed and one for all layers alike.

TransformerLens keeps both in every layer, for all of n_ctx: 2 GB of masks for 30 layers of 8,192 positions.
"""

from typing import Any

from transformer_lens import HookedTransformer


def share(model: HookedTransformer, n: int) -> None:
    """Make them for `n` positions."""
    cfg = model.cfg
    made: dict[str, Any] = {}
    for block in model.blocks:
        attn: Any = block.attn
        if (of_kind := made.get(attn.attn_type)) is None:
            of_kind = made[attn.attn_type] = attn
            attn._extend_mask(n)
            if cfg.positional_embedding_type == "rotary":
                local = attn.attn_type == "local" and cfg.rotary_base_local is not None
                base = cfg.rotary_base_local if local else cfg.rotary_base
                table = attn.calculate_sin_cos_rotary(cfg.rotary_dim, n, base=base, dtype=cfg.dtype)
                attn.rotary_sin, attn.rotary_cos = (each.to(attn.mask.device) for each in table)
        attn.mask = of_kind.mask
        if cfg.positional_embedding_type == "rotary":
            attn.rotary_sin, attn.rotary_cos = of_kind.rotary_sin, of_kind.rotary_cos


def reach(model: HookedTransformer, n: int) -> None:
    """Make them for at least `n` positions, where they are not."""
    here = model.blocks[0].attn.mask.shape[0]
    if n > here:
        share(model, min(max(n, 2 * here), model.cfg.n_ctx))
