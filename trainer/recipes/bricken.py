"""bricken: |x - x_hat|^2 + coefficient * sum_i f_i, f = relu((x - b_dec) W_enc + b_enc), decoder rows of norm 1.

Bricken et al. 2023, "Towards Monosemanticity". The norm is kept by the optimiser; dead features are resampled.
"""

from jaxtyping import Float
from torch import Tensor

from trainer.kernels import l1
from trainer.kernels.dense import Outcome, Params
from trainer.recipes.recipe import Recipe, Step


def gradients(params: Params, x: Float[Tensor, "head batch width"], step: Step) -> Outcome:
    """Of the loss above."""
    return l1.gradients(params, x, step.coefficient, step.active_share, weighted=False, centred=True)


def for_use(params: Params, threshold: Float[Tensor, " group"]) -> Params:
    """b_dec is no longer subtracted: what it does to the encoder moves into b_enc."""
    return params | {"b_enc": params["b_enc"] - (params["b_dec"][:, None] @ params["W_enc"])[:, 0]}


RECIPE = Recipe(
    defaults={
        "l1_coefficient": 2.0,
        "decoder_norm": "unit",
        "lr": 1.2e-3,
        "beta2": 0.99,
        "max_grad_norm": 0.0,
        "resample_fraction": 0.125,
    },
    gradients=gradients,
    centred=True,
    resamples=True,
    for_use=for_use,
)
