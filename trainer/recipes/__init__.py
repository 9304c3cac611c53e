"""Recipes: one file each, with its defaults, start, loss and gradients, and weights for use."""

from typing import Literal

from trainer.recipes import april, batchtopk, bricken, gated, jumprelu, topk
from trainer.recipes.recipe import Recipe

Name = Literal["april", "bricken", "gated", "jumprelu", "topk", "batchtopk"]
RECIPES: dict[str, Recipe] = {
    "april": april.RECIPE,
    "bricken": bricken.RECIPE,
    "gated": gated.RECIPE,
    "jumprelu": jumprelu.RECIPE,
    "topk": topk.RECIPE,
    "batchtopk": batchtopk.RECIPE,
}
