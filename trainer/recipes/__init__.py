"""Recipes, presets and sweeps: which SAEs a run trains, as frozen dataclasses that are also the command line."""

import math
from dataclasses import dataclass, fields
from itertools import product
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trainer.config import require

Recipe = Literal["april", "bricken", "gated", "jumprelu", "topk", "batchtopk"]
Preset = Literal["reference", "kissane"]
TOP_K = ("topk", "batchtopk")  # recipes whose sparsity is a number of features; the others have a coefficient
LISTED = {"recipe", "hook_layer", "l1_coefficient", "k"}  # fields of an SAE of which a sweep has lists
CENTRED = ("bricken", "gated")  # recipes that subtract b_dec from the input of the encoder
_OF_RECIPE = {"recipe", "l1_coefficient", "decoder_norm", "beta2", "resample_fraction"}  # not kept with another recipe

# What a recipe sets where neither a preset nor the user does. Sources: README, "Recipes".
_COMMON = {
    "block": "head",
    "expansion_factor": 16,
    "normalize": "per_head",
    "init": "transpose",
    "b_dec_init": "mean",
    "decoder_norm": "free",
    "k_scope": "layer",
    "lr": 1e-3,
    "beta2": 0.999,
    "lr_warm_up_fraction": 0.0,
    "lr_decay_fraction": 0.2,
    "sparsity_warm_up_fraction": 0.05,
    "max_grad_norm": 1.0,
    "resample_fraction": 0.0,
}
_RECIPES: dict[str, dict[str, Any]] = {
    "april": {"l1_coefficient": 2.0},
    "bricken": {
        "l1_coefficient": 2.0, "decoder_norm": "unit", "lr": 1.2e-3, "beta2": 0.99, "max_grad_norm": 0.0,
        "resample_fraction": 0.125,
    },
    "gated": {"l1_coefficient": 2.0, "decoder_norm": "unit"},
    "jumprelu": {"l1_coefficient": 2.0, "sparsity_warm_up_fraction": 1.0, "lr": 2e-3},
    "topk": {"k": 32, "decoder_norm": "unit", "lr": 2e-3},
    "batchtopk": {"k": 32, "decoder_norm": "unit", "lr": 2e-3},
}  # fmt: skip
_PRESETS: dict[str, dict[str, Any]] = {
    # shehper/attn_saes: global scale, nn.Linear initialisation, no decay of the learning rate.
    "reference": {
        "recipe": "april", "block": "head", "expansion_factor": 32, "l1_coefficient": 2.0, "normalize": "global",
        "init": "linear", "b_dec_init": "linear", "decoder_norm": "free", "lr": 5e-5, "beta2": 0.999,
        "lr_warm_up_fraction": 0.0, "lr_decay_fraction": 0.0, "sparsity_warm_up_fraction": 0.05, "max_grad_norm": 1.0,
    },
    # Kissane et al. 2024 (arXiv:2406.17759): a dense SAE on the concatenated heads, as Bricken et al. 2023 trained.
    "kissane": {
        "recipe": "bricken", "block": "dense", "expansion_factor": 32, "l1_coefficient": 2.0, "normalize": "none",
        "init": "transpose", "b_dec_init": "zeros", "decoder_norm": "unit", "lr": 1.2e-3, "beta2": 0.99,
        "lr_warm_up_fraction": 0.0, "lr_decay_fraction": 0.2, "sparsity_warm_up_fraction": 0.05, "max_grad_norm": 0.0,
        "resample_fraction": 0.125,
    },
}  # fmt: skip


@dataclass(frozen=True)
class SAEConfig:
    """One autoencoder: what it is, and what it is trained to minimise.

    On the command line a field that is left out takes the preset's value, else the recipe's, so None
    is never left in the `SAEConfig` of a run (but `l1_coefficient` or `k`, of which a recipe has one).
    """

    recipe: Recipe
    """Loss and constraints; README, "Recipes", has the formulas."""
    hook_layer: int
    """Attention layer whose head outputs (blocks.{hook_layer}.attn.hook_z) are reconstructed."""
    l1_coefficient: float | None = None
    """Sparsity coefficient of april, bricken, gated and jumprelu."""
    k: int | None = None
    """Active features of topk and batchtopk, per token of the layer, or of each head where k_scope is head."""
    preset: Preset | None = None
    """A published set-up: reference (shehper/attn_saes) or kissane; further options change one switch at a time."""
    label: str | None = None
    """Part of the checkpoint's name that tells this SAE from others; default preset or recipe."""
    block: Literal["head", "dense"] | None = None
    """head: one block per attention head; dense: the baseline, one block over all heads."""
    expansion_factor: int | None = None
    """Features per head divided by d_head; of a dense SAE, features divided by d_in."""
    k_scope: Literal["layer", "head"] | None = None
    """Whether the heads compete for the active features of topk and batchtopk (layer) or have k each (head)."""
    normalize: Literal["per_head", "global", "none"] | None = None
    """Scale of the inputs: E|x_h| = sqrt(d_head) for every head, E|x| = sqrt(d_in), or as they are."""
    init: Literal["transpose", "linear"] | None = None
    """W_enc = W_dec transposed, or the uniform defaults of torch.nn.Linear (the reference's)."""
    b_dec_init: Literal["mean", "geometric_median", "zeros", "linear"] | None = None
    """Decoder bias at the start, from the first activations or without them."""
    decoder_norm: Literal["free", "unit"] | None = None
    """Whether decoder rows keep norm 1 (gradient projected, renormalised after every step)."""
    lr: float | None = None
    """Peak learning rate of Adam."""
    beta2: float | None = None
    """Adam's second decay rate; the first is 0.9."""
    lr_warm_up_fraction: float | None = None
    """Share of the steps over which the learning rate rises from 0."""
    lr_decay_fraction: float | None = None
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    sparsity_warm_up_fraction: float | None = None
    """Share of the steps over which the sparsity coefficient rises from 0."""
    max_grad_norm: float | None = None
    """Gradient norm of the whole SAE at which its gradient is clipped; 0 never clips."""
    resample_fraction: float | None = None
    """Of bricken: dead features are resampled at 1, 2, 3 and 4 times this share of the steps; 0 never."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(SAEConfig).items():
            _check_type(name, getattr(self, name), hint)
        require(self.hook_layer >= 0, f"hook_layer must be 0 or more, got {self.hook_layer}")
        require(self.expansion_factor >= 1, f"expansion_factor must be at least 1, got {self.expansion_factor}")
        if self.recipe in TOP_K:
            require(self.l1_coefficient is None, f"{self.recipe} has no l1_coefficient: its sparsity is k")
            require(self.k >= 1, f"k must be at least 1, got {self.k}")
        else:
            require(self.k is None, f"{self.recipe} has no k: its sparsity is l1_coefficient")
            require(
                math.isfinite(self.l1_coefficient) and self.l1_coefficient >= 0,
                f"l1_coefficients must be finite and 0 or more, got {self.l1_coefficient}",
            )
        require(self.lr > 0, f"lr must be positive, got {self.lr}")
        require(0 <= self.beta2 < 1, f"beta2 must lie between 0 and 1, got {self.beta2}")
        require(self.max_grad_norm >= 0, f"max_grad_norm must be 0 or more, got {self.max_grad_norm}")
        for key in ("lr_warm_up_fraction", "lr_decay_fraction", "sparsity_warm_up_fraction"):
            require(0 <= getattr(self, key) <= 1, f"{key} must lie between 0 and 1, got {getattr(self, key)}")
        require(
            self.lr_warm_up_fraction + self.lr_decay_fraction <= 1,
            "lr_warm_up_fraction and lr_decay_fraction must not add up to more than 1",
        )
        require(
            0 <= self.resample_fraction <= 0.25,
            f"resample_fraction must lie between 0 and 0.25, got {self.resample_fraction}",
        )
        require(self.recipe == "bricken" or self.resample_fraction == 0, f"{self.recipe} has no resample_fraction")

    @classmethod
    def resolve(cls, **given: Any) -> "SAEConfig":
        """Fill what is None in `given` from its preset, then from its recipe."""
        chosen = {key: value for key, value in given.items() if value is not None}
        preset = _PRESETS.get(chosen.get("preset", ""), {})
        recipe = chosen.get("recipe") or preset["recipe"]
        if recipe != preset.get("recipe", recipe):
            preset = {key: value for key, value in preset.items() if key not in _OF_RECIPE}
        return cls(**(_COMMON | _RECIPES[recipe] | preset | {"recipe": recipe} | chosen))

    def all_but_sparsity(self) -> tuple:
        """Equal for SAEs that can be trained as one stack."""
        own = ("l1_coefficient", "k", "label", "preset")
        return tuple(getattr(self, each.name) for each in fields(self) if each.name not in own)

    @property
    def sparsity(self) -> str:
        """The coefficient or k as a part of a name: l1_2, k32."""
        return f"k{self.k}" if self.recipe in TOP_K else f"l1_{self.l1_coefficient:g}"


@dataclass(frozen=True)
class SweepConfig:
    """Which SAEs train together on one stream of activations: every combination of the lists."""

    recipe: list[Recipe] | Recipe | None = None
    """One recipe or several; default batchtopk, or april where l1_coefficients are given."""
    hook_layer: list[int] | int = 17
    """One attention layer or several (blocks.{hook_layer}.attn.hook_z)."""
    l1_coefficients: list[float] | float | None = None
    """Sparsity coefficients of april, bricken, gated and jumprelu; each trains its own SAE."""
    k: list[int] | int | None = None
    """Active features of topk and batchtopk, per token of the layer, or of each head where k_scope is head."""
    points: list[dict[str, Any]] | None = None
    """Further SAEs, for a YAML file: each entry is a set of the SAE options here, over those given outside it."""

    def expand(self, options: dict[str, Any]) -> list[SAEConfig]:
        """Every SAE of the sweep.

        Args:
            options: fields of SAEConfig shared by all of them; None where not given.

        Raises:
            ValueError: an unknown option, a wrong value, or two SAEs that are the same.
        """
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "points"}
        options = {key: value for key, value in options.items() if key not in LISTED}
        known = {*own, *options}
        require(self.points != [], "points is empty: name at least one")
        saes = []
        for entry in self.points or [{}]:
            unknown = sorted(set(entry) - known)
            require(not unknown, f"points: unknown option {', '.join(unknown)}")
            saes += _combine({**own, **options, **entry})
        require(len(set(saes)) == len(saes), "the sweep names the same SAE twice")
        return saes


def _combine(options: dict[str, Any]) -> list[SAEConfig]:
    """The product of the lists in one set of options."""
    lists = {key: _as_list(options.pop(key)) for key in ("l1_coefficients", "k", "hook_layer", "recipe")}
    preset = options.get("preset")
    require(preset is None or preset in _PRESETS, f"preset must be one of {', '.join(_PRESETS)}, got {preset!r}")
    for recipe in lists["recipe"]:
        require(recipe is None or recipe in _RECIPES, f"recipe must be one of {', '.join(_RECIPES)}, got {recipe!r}")
    if lists["recipe"] == [None]:
        by_sparsity = "batchtopk" if lists["l1_coefficients"] == [None] else "april"
        lists["recipe"] = [_PRESETS[preset]["recipe"] if preset else by_sparsity]
    saes = []
    for layer, recipe in product(lists["hook_layer"], lists["recipe"]):
        given, other = ("k", "l1_coefficients") if recipe in TOP_K else ("l1_coefficients", "k")
        require(len(lists["recipe"]) > 1 or lists[other] == [None], f"{recipe} has no {other}: its sparsity is {given}")
        for value in lists[given]:
            sparsity = {given.removesuffix("s"): value}
            saes.append(SAEConfig.resolve(**options, recipe=recipe, hook_layer=layer, **sparsity))
    return saes


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse what a YAML file can hold and the hint, made of None, str, int, float and Literal, does not allow."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        allowed = value in choices or (value is None and NoneType in kinds)
        require(allowed, f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return
    numeric = (float in kinds and isinstance(value, int)) or isinstance(value, kinds)
    require(numeric and not isinstance(value, bool), f"{name} has the wrong type: {value!r}")


def _as_list(value: Any) -> list[Any]:
    require(value != [], "an empty list of l1_coefficients, k, recipe or hook_layer: name at least one")
    return value if isinstance(value, list) else [value]
