"""Frames of what checkpoint directories say about themselves, for the Tradeoffs, Heads and Compare pages."""

from pathlib import Path
from typing import Any

import pandas as pd

from trainer import checkpoint

# Metric keys of eval.json with the axis label that says exactly what is drawn.
METRICS = {
    "MSE": "MSE (squared error summed over d_in, mean over tokens)",
    "MSE_per_dim": "MSE per dimension (mean over tokens and d_in)",
    "FVU": "FVU (fraction of variance unexplained)",
    "CE_score": "CE score (share of the zero-ablation loss recovered)",
    "KL_score": "KL score (1 - KL to SAE / KL to zero ablation)",
}
_SCALARS = ("L0", "MSE", "FVU", "CE_score", "CE_score_se", "KL_score", "KL_score_se", "dead_fraction")


def summary(listed: list[checkpoint.Listed]) -> pd.DataFrame:
    """One row per readable checkpoint. A run without eval.json shows its last training batch instead."""
    rows = []
    for path, config, _ in listed:
        if config is None:
            continue
        figures, source = checkpoint.load_eval(path), "held-out"
        if figures is None:
            lines = checkpoint.load_metrics(path)
            figures, source = (lines[-1] if lines else {}), "training batch"
        shape = config["sae"]
        d_in = shape["n_heads"] * shape["d_head"]
        row = {
            "name": path.name,
            "recipe": _recipe(config),
            "sparsity": _sparsity(config),
            "status": config["status"],
            "figures": source,
            **{key: figures.get(key) for key in _SCALARS},
            "MSE_per_dim": figures["MSE"] / d_in if "MSE" in figures else None,
            "n_tokens": figures.get("n_tokens"),
            "tokens_seen": figures.get("tokens", config.get("tokens_seen", 0)),
            "model": Path(config["model"]["name"]).name,
            "hook_layer": config["model"]["hook_layer"],
            "d_sae": shape["n_heads"] * shape["features_per_head"],
        }
        rows.append(row)
    frame = pd.DataFrame(rows)
    numeric = [c for c in (*_SCALARS, "MSE_per_dim", "n_tokens", "tokens_seen") if c in frame]
    frame[numeric] = frame[numeric].apply(pd.to_numeric)  # None (not measurable) becomes NaN
    return frame


def _recipe(config: dict[str, Any]) -> str:
    """What tells a family of checkpoints from others: its label, preset or recipe."""
    options = config["training"]
    name = options.get("label") or options.get("preset") or config.get("recipe", "unknown")
    return f"{name} (dense)" if config.get("block") == "dense" else name


def _sparsity(config: dict[str, Any]) -> str:
    """The coefficient or k, as one reads it."""
    k, coefficient = (config["training"].get(key) for key in ("k", "l1_coefficient"))
    return f"k {k}" if k else "" if coefficient is None else f"λ {coefficient:g}"


def curves(paths: list[Path]) -> pd.DataFrame:
    """Every logged step of the given checkpoints: name, step, tokens, and the scalar figures."""
    rows = []
    for path in paths:
        for line in checkpoint.load_metrics(path):
            rows.append(
                {"name": path.name} | {key: value for key, value in line.items() if not isinstance(value, list)}
            )
    return pd.DataFrame(rows)


def per_head(figures: dict[str, Any], n_heads: int) -> pd.DataFrame:
    """One row per head of the model; a dense SAE has no L0 and dead share per head (NaN)."""
    columns = {"head": list(range(n_heads))}
    for key in _SCALARS:
        stored = key.replace("_se", "_per_head_se") if key.endswith("_se") else f"{key}_per_head"
        values = figures.get(stored) or []
        columns[key] = values if len(values) == n_heads else [None] * n_heads
    frame = pd.DataFrame(columns)
    frame[list(_SCALARS)] = frame[list(_SCALARS)].apply(pd.to_numeric)
    return frame


def histograms(figures: dict[str, Any]) -> pd.DataFrame:
    """Share of tokens at every per-token L0, one run of rows per head (or the one block of a dense SAE)."""
    counts = figures.get("L0_histogram_per_head") or []
    rows = [(head, l0, count / sum(of_head)) for head, of_head in enumerate(counts) for l0, count in enumerate(of_head)]
    return pd.DataFrame(rows, columns=["head", "L0", "share"])
