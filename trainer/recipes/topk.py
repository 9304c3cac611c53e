"""topk: |x - x_hat|^2 + AuxK, f the k largest pre-activations of a token where positive, decoder rows of norm 1.

Gao et al. 2024 (arXiv:2406.04093). AuxK, which revives dead features, is in optimise/revive.py.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.kernels import dense, select, sparse
from trainer.kernels.dense import Outcome, Params
from trainer.recipes.recipe import Recipe, Step


def gradients(params: Params, x: Float[Tensor, "head batch width"], step: Step) -> Outcome:
    """Of the squared error."""
    if dense.in_tiles(x):
        return sparse.gradients(params, x, sparse.top_k(params, x, torch.tensor(step.k), step.over_layer))
    return dense.gradients(params, x, lambda pre: select.top_k(pre, step.k, step.over_layer))[0]


RECIPE = Recipe(
    defaults={"k": 32, "decoder_norm": "unit", "lr": 2e-3},
    gradients=gradients,
    sparsity="k",
    activation="topk",
    weights={"aux_k": 1.0},
)
