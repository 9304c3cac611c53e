"""gated: |x - x_hat|^2 + coefficient * sum_i relu(gate_i) + |x - x_hat(relu(gate))|^2, decoder frozen in the last.

s = (x - b_dec) W_enc, gate = s + b_enc, f = 1[gate > 0] relu(e^r s + b_mag), decoder rows of norm 1.
Rajamanoharan et al. 2024 (arXiv:2404.16014).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.kernels.dense import Outcome, Params, Tile, empty_outcome, linear, over_tiles
from trainer.recipes.recipe import Recipe, Step


def start(params: Params, x: Float[Tensor, "row block width"], init: str) -> Params:
    """Magnitudes equal to the gates."""
    return params | {name: torch.zeros_like(params["b_enc"]) for name in ("r_mag", "b_mag")}


def gradients(params: Params, x: Float[Tensor, "head batch width"], step: Step) -> Outcome:
    """Of the loss above."""
    coefficient = step.coefficient
    W_enc, W_dec, b_dec = (params[name] for name in ("W_enc", "W_dec", "b_dec"))
    batch = x.shape[1]
    gain = params["r_mag"].exp()
    out = empty_outcome(params, x)
    penalty, auxiliary = torch.zeros_like(gain), torch.zeros_like(coefficient)

    def add(tile: Tile) -> None:
        blocks, rows, target = tile
        inputs = target - b_dec[blocks, None]
        s = torch.bmm(inputs, W_enc[blocks])
        gate = (s + params["b_enc"][blocks, None]).clamp_(min=0)
        is_open = gate.sign()
        f = (s * gain[blocks, None] + params["b_mag"][blocks, None]).clamp_(min=0).mul_(is_open)
        error = torch.sub(linear(f, W_dec[blocks], b_dec[blocks]), target, out=out.error[blocks, rows])
        g = error * (2 / batch)
        out.grads["W_dec"][blocks].baddbmm_(f.mT, g)
        d_mag = torch.bmm(g, W_dec[blocks].mT).mul_(f.sign())
        frozen = linear(gate, W_dec[blocks], b_dec[blocks]) - target
        slope = (coefficient / batch)[blocks, None, None]
        d_gate = torch.bmm(frozen * (2 / batch), W_dec[blocks].mT).add_(slope).mul_(is_open)
        out.grads["b_mag"][blocks] += d_mag.sum(1)
        out.grads["r_mag"][blocks] += (d_mag * s).sum(1) * gain[blocks]
        out.grads["b_enc"][blocks] += d_gate.sum(1)
        ds = d_mag.mul_(gain[blocks, None]).add_(d_gate)
        out.grads["W_enc"][blocks].baddbmm_(inputs.mT, ds)
        out.grads["b_dec"][blocks] -= (W_enc[blocks] @ ds.sum(1)[..., None])[..., 0]
        penalty[blocks] += gate.sum(1)
        auxiliary[blocks] += frozen.pow(2).sum((1, 2))
        out.fired[blocks] += f.sign_().sum(1)

    over_tiles(add, x, len(W_enc))
    out.grads["b_dec"].add_(out.error.sum(1), alpha=2 / batch)
    out.terms["l1"] = penalty.sum(1) / batch
    out.terms["auxiliary"] = auxiliary / batch
    return out


def for_use(params: Params, threshold: Float[Tensor, " group"]) -> Params:
    """As jumprelu: gate > 0 exactly where e^r s + b_mag > b_mag - e^r b_enc."""
    gain, b_enc = params["r_mag"].exp(), params["b_enc"]
    # The constant part of s, -b_dec W_enc, moves into the bias.
    offset = b_enc - (params["b_dec"][:, None] @ params["W_enc"])[:, 0] - b_enc
    return params | {
        "threshold": (params["b_mag"] - gain * b_enc).clamp_min(0),
        "b_enc": params["b_mag"] + gain * offset,
        "W_enc": params["W_enc"] * gain[:, None],
    }


RECIPE = Recipe(
    defaults={"l1_coefficient": 2.0, "decoder_norm": "unit"},
    gradients=gradients,
    activation="jumprelu",
    centred=True,
    weights={"auxiliary": 1.0},
    start=start,
    for_use=for_use,
)
