"""Parameters of SAEs before the first step, and the statistics of the data that they start from."""

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.config import SAEConfig
from trainer.kernels.dense import Params
from trainer.recipes import RECIPES


def input_scale(z: Float[Tensor, "row head d_head"], normalize: str) -> Float[Tensor, "head d_head"]:
    """The factor of every input dimension: E|x_h| = sqrt(d_head), or E|x| = sqrt(d_in), or 1."""
    n_heads, d_head = z.shape[1:]
    if normalize == "per_head":
        scale = d_head**0.5 / z.norm(dim=-1).mean(0).clamp_min(1e-6)
    elif normalize == "global":
        scale = ((n_heads * d_head) ** 0.5 / z.flatten(1).norm(dim=-1).mean()).expand(n_heads)
    else:
        scale = torch.ones(n_heads)
    return scale[:, None].expand(n_heads, d_head).contiguous()


def initial_params(
    cfg: SAEConfig, x: Float[Tensor, "row block width"], n_features: int, generator: torch.Generator
) -> Params:
    """Fresh parameters of one SAE, on the CPU.

    `transpose`: random decoder directions, W_enc = W_dec transposed, and an encoder bias that centres the
    data. With ReLU about half of the features fire at first and their sum overshoots the input by
    features / (2 width); rows of norm sqrt(2 width / features) undo that. Where decoder rows have to keep
    norm 1, the encoder is shrunk instead.

    `linear`: U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases, the default of torch.nn.Linear.

    Args:
        x: rows of scaled inputs, for decoder and threshold biases.
    """
    recipe, (_, n_blocks, width) = RECIPES[cfg.recipe], x.shape

    def uniform(bound: float, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * bound

    out_bound = n_features**-0.5
    b_dec = {
        "mean": lambda: x.mean(0),
        "geometric_median": lambda: geometric_median(x),
        "zeros": lambda: torch.zeros(n_blocks, width),
        "linear": lambda: uniform(out_bound, n_blocks, width),
    }[cfg.b_dec_init]()
    if cfg.init == "linear":
        in_bound = width**-0.5
        W_enc, b_enc = uniform(in_bound, n_blocks, width, n_features), uniform(in_bound, n_blocks, n_features)
        W_dec = uniform(out_bound, n_blocks, n_features, width)
        if cfg.decoder_norm == "unit":
            W_dec = torch.nn.functional.normalize(W_dec, dim=-1)
    else:
        rows = torch.nn.functional.normalize(torch.randn(n_blocks, n_features, width, generator=generator), dim=-1)
        selects = recipe.sparsity == "k"
        gain = 1.0 if selects else min(1.0, 2 * width / n_features)
        unit = selects or cfg.decoder_norm == "unit"
        W_dec = rows * (1.0 if unit else gain**0.5)
        W_enc = (rows * (gain if unit else gain**0.5)).mT.contiguous()
        b_enc = torch.zeros(n_blocks, n_features)
        if not recipe.centred:
            b_enc = -(b_dec[:, None] @ W_enc)[:, 0]
    params = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    return recipe.start(params, x, cfg.init)


def geometric_median(x: Float[Tensor, "row block width"], steps: int = 50) -> Float[Tensor, "block width"]:
    """The point of smallest mean distance to the rows, by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - median).norm(dim=-1, keepdim=True).clamp_min(1e-6)
        median = (x * weight).sum(0) / weight.sum(0)
    return median
