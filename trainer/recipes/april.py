"""april: |x - x_hat|^2 + coefficient * sum_i f_i |d_i|, f = relu(x W_enc + b_enc).

Anthropic, Circuits Updates April 2024, "Update on how we train SAEs": weighting by the length of the decoder row
keeps the decoder free, because shrinking f and growing d no longer lowers the penalty.
"""

from jaxtyping import Float
from torch import Tensor

from trainer.kernels import l1
from trainer.kernels.dense import Outcome, Params
from trainer.recipes.recipe import Recipe, Step


def gradients(params: Params, x: Float[Tensor, "head batch width"], step: Step) -> Outcome:
    """Of the loss above."""
    return l1.gradients(params, x, step.coefficient, step.active_share, weighted=True, centred=False)


RECIPE = Recipe(defaults={"l1_coefficient": 2.0}, gradients=gradients)
