"""SAEs of Kissane, Krzyzanowski et al. 2024 (arXiv:2406.17759): NAME.pt beside NAME_cfg.json.

    f = relu((z - b_dec) W_enc + b_enc)          z_hat = f W_dec + b_dec

z are the heads of a layer one after the other. Their models are loaded as TransformerLens does by default, so that
value biases are not in z.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec

from trainer.imports import weights
from trainer.imports.described import check_shapes, checked, layer_of, read_json
from trainer.imports.trained import Trained


class _Config(msgspec.Struct):
    act_name: str
    act_size: int
    dict_size: int
    model_name: str | None = None
    seq_len: int | None = None
    l1_coeff: float | None = None


def read(fetch: Callable[[str], Path], name: str) -> Trained:
    """Read NAME.pt and NAME_cfg.json.

    Args:
        fetch: from the name of a file to its path here.
        name: of the weights.

    Raises:
        ValueError: a file is missing, damaged, or not of an SAE of hook_z; the weights are more than tensors.
    """
    cfg = checked(read_json(fetch(f"{name.removesuffix('.pt')}_cfg.json")), _Config)
    layer = layer_of(cfg.act_name)
    p = weights.read_pickle(fetch(name))
    d_in, d_sae = cfg.act_size, cfg.dict_size
    check_shapes(p, {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)})
    return Trained(
        source="Kissane et al.",
        layer=layer,
        W_enc=p["W_enc"],
        b_enc=p["b_enc"] - p["b_dec"] @ p["W_enc"],
        W_dec=p["W_dec"],
        b_dec=p["b_dec"],
        folds_value_biases=True,
        model=cfg.model_name,
        context_size=cfg.seq_len,
        l1_coefficient=cfg.l1_coeff,
    )
