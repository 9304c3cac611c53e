"""batchtopk: |x - x_hat|^2 + AuxK, f the k * B largest pre-activations of the batch, decoder rows of norm 1.

In use f = pre where pre > theta, the running mean of the smallest activation that was kept.
Bussmann et al. 2024 (arXiv:2412.06410).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from trainer import ranks
from trainer.kernels import dense, select, sparse
from trainer.kernels.dense import Outcome, Params
from trainer.recipes.recipe import Recipe, Step


def gradients(params: Params, x: Float[Tensor, "head batch width"], step: Step) -> Outcome:
    """Of the squared error; moves the running threshold."""
    counts = [k * x.shape[1] * ranks.size() for k in step.k for _ in range(len(step.threshold) // len(step.k))]
    if dense.in_tiles(x):
        few = torch.tensor(counts)
        guess = ranks.mean(sparse.first_guess(params, x, few)) if step.guess.isnan().any() else step.guess
        active, smallest = sparse.batch_top_k(params, x, few, guess)
        _remember(step, smallest)
        return sparse.gradients(params, x, active)

    def activate(pre: Tensor) -> Tensor:
        smallest = select.smallest_kept(pre, counts, step.guess)
        _remember(step, smallest)
        return select.at_least(pre, smallest)

    return dense.gradients(params, x, activate)[0]


def _remember(step: Step, smallest: Float[Tensor, " group"]) -> None:
    step.guess.copy_(smallest * 0.9)
    step.threshold.add_(step.rate * (smallest - step.threshold))


def for_use(params: Params, threshold: Float[Tensor, " group"]) -> Params:
    """The threshold of its point, or of its block, for every feature."""
    return params | {"threshold": threshold[:, None].expand_as(params["b_enc"])}


RECIPE = Recipe(
    defaults={"k": 32, "decoder_norm": "unit", "lr": 2e-3},
    gradients=gradients,
    sparsity="k",
    activation="jumprelu",
    weights={"aux_k": 1.0},
    for_use=for_use,
)
