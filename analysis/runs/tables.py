"""Frames of what checkpoint directories say about themselves, for the Tradeoffs, Heads and Compare pages."""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from trainer.checkpoint import Checkpoint, CheckpointError, read_metrics

# Metric keys of eval.json with the axis label that says exactly what is drawn.
METRICS = {
    "MSE": "MSE (squared error summed over d_in, mean over tokens)",
    "MSE_per_dim": "MSE per dimension (mean over tokens and d_in)",
    "FVU": "FVU (fraction of variance unexplained)",
    "CE_score": "CE score (share of the zero-ablation loss recovered)",
    "KL_score": "KL score (1 - KL to SAE / KL to zero ablation)",
}
SCORES = ("CE_score", "KL_score")  # larger is better; they can be negative or above 1
_FIGURES = ("L0", "MSE", "FVU", *SCORES, "norm_ratio", "bias")
MEASURED = (*_FIGURES, *(f"{name}_se" for name in (*_FIGURES, "MSE_per_dim")))  # some of it may not be measurable
_SCALARS = (*_FIGURES, *(f"{name}_se" for name in _FIGURES), "silent_fraction", "dead_fraction")


def with_error(figures: dict[str, Any], name: str, digits: int = 3) -> str:
    """A figure of eval.json and its standard error, as one reads them."""
    value, se = figures.get(name), figures.get(f"{name}_se")
    if value is None:
        return "not measurable"
    return f"{value:,.{digits}f}" + ("" if se is None else f" ± {se:,.{digits}f}")


def outside(score: float | None) -> str:
    """In words what a score says that lies outside of 0 to 1; nothing of others, also of none."""
    if score is None or math.isnan(score) or 0 <= score <= 1:
        return ""
    return "above 1: predicts better than without the SAE" if score > 1 else "below 0: worse than zero ablation"


def summary(checkpoints: list[Checkpoint], repeated: bool = False, head: int | None = None) -> pd.DataFrame:
    """One row per checkpoint. A run without eval.json shows its last training batch instead.

    `silent_fraction` is of the features on the tokens of eval.json, `dead_fraction` of those in training at its last
    logged step (docs/metrics.md).

    Args:
        checkpoints: of models with the same number of heads, where `head` is given.
        repeated: figures on repeated random tokens instead of held-out text.
        head: figures of one head; scores with only that head replaced. A dense SAE has no L0 of a head (NaN).
    """
    rows = []
    for checkpoint in checkpoints:
        config, model = checkpoint.config, checkpoint.config.model
        figures, source = _figures(checkpoint, repeated)
        width = model.n_heads * model.d_head
        last, seconds = _log_of(checkpoint.path)
        n_tokens = figures.get("n_tokens")
        trained = last
        if head is not None:
            figures, trained = (dict(per_head(each, model.n_heads).loc[head]) for each in (figures, last))
            width = model.d_head
        row = {
            "name": checkpoint.name,
            "recipe": checkpoint.recipe,
            "sparsity": checkpoint.sparsity,
            "block": "dense" if checkpoint.is_dense else "head",
            "status": config.status,
            "figures": source,
            **{key: figures.get(key) for key in _SCALARS},
            "dead_fraction": trained.get("dead_fraction"),
            "MSE_per_dim": None if figures.get("MSE") is None else figures["MSE"] / width,
            "MSE_per_dim_se": None if figures.get("MSE_se") is None else figures["MSE_se"] / width,
            "n_tokens": n_tokens,
            "parameters": config.sae.n_parameters,
            # config.json is written when weights are saved, the log more often.
            "tokens_seen": last.get("tokens", config.tokens_seen),
            "training_seconds": seconds,
            "model": Path(model.name).name,
            "hook_layer": model.hook_layer,
            "d_sae": config.sae.d_sae,
        }
        rows.append(row)
    frame = pd.DataFrame(rows)
    numeric = [*_SCALARS, "MSE_per_dim", "MSE_per_dim_se", "n_tokens", "tokens_seen", "training_seconds"]
    numeric = [column for column in numeric if column in frame]
    frame[numeric] = frame[numeric].apply(pd.to_numeric)  # None (not measurable, not known) becomes NaN
    return frame


def training_seconds(lines: list[dict[str, Any]]) -> float | None:
    """Time that the logged steps took, from each line's tokens and tokens per second; None where it is not logged.

    Pauses between an interruption and its continuation, harvesting and evaluations are not in it. SAEs of one
    command train together, so each has the time of all of them.
    """
    seconds, before = 0.0, 0
    for line in lines:
        speed = line.get("tokens_per_second")
        if not speed or line.get("tokens") is None:
            return None
        seconds += (line["tokens"] - before) / speed
        before = line["tokens"]
    return seconds if lines else None


def pareto(frame: pd.DataFrame, metric: str) -> pd.Series:
    """Which rows no other row of the same recipe beats: fewer or as many active features, and as good or better."""
    sign = -1 if metric in SCORES else 1
    front = pd.Series(False, index=frame.index)
    for _, family in frame.groupby("recipe"):
        best, at = math.inf, math.nan
        points = sorted(zip(family["L0"], sign * family[metric], family.index, strict=True))
        for l0, loss, index in points:
            if loss < best or (loss == best and l0 == at):
                front[index], best, at = True, loss, l0
    return front


def _figures(checkpoint: Checkpoint, repeated: bool) -> tuple[dict[str, Any], str]:
    figures = checkpoint.eval
    if repeated:
        return (figures or {}).get("induction") or {}, "repeated tokens"
    if figures is None:
        return _log_of(checkpoint.path)[0], "training batch"
    return figures, "held-out"


def _log_of(path: Path) -> tuple[dict[str, Any], float | None]:
    """The last line of metrics.jsonl and `training_seconds`; nothing where it is missing or damaged."""
    try:
        now = (path / "metrics.jsonl").stat()
    except OSError:
        return {}, None
    return _read_log(path, now.st_mtime_ns, now.st_size)


@lru_cache(maxsize=256)  # a page that refreshes itself reads only the logs that grew
def _read_log(path: Path, modified: int, size: int) -> tuple[dict[str, Any], float | None]:
    try:
        lines = read_metrics(path)
    except CheckpointError:  # the training curves say so
        return {}, None
    return (lines[-1] if lines else {}), training_seconds(lines)


def curves(checkpoints: list[Checkpoint]) -> pd.DataFrame:
    """Every logged step of the given checkpoints: name, step, tokens, and the scalar figures."""
    rows = []
    for checkpoint in checkpoints:
        for line in checkpoint.metrics():
            scalars = {key: value for key, value in line.items() if not isinstance(value, list)}
            rows.append({"name": checkpoint.name} | scalars | {"name": checkpoint.name})
    return pd.DataFrame(rows)


def thinned(frame: pd.DataFrame, figure: str, most: int = 400) -> pd.DataFrame:
    """The rows of `curves` that have a figure, at most about so many of each checkpoint, its last one included."""
    frame = frame.dropna(subset=[figure])
    after = frame.groupby("name").cumcount(ascending=False)
    every = -(-frame.groupby("name")["name"].transform("size") // most)
    return frame[after % every == 0]


def per_head(figures: dict[str, Any], n_heads: int) -> pd.DataFrame:
    """One row per head of the model; a dense SAE has no L0 and silent share per head (NaN)."""
    columns: dict[str, list[Any]] = {"head": list(range(n_heads))}
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


def binned(frame: pd.DataFrame, bins: int = 40) -> pd.DataFrame:
    """Shares of tokens by single L0 (name, head, L0, share), in at most `bins` bins of the same width in a panel.

    The last bin holds all larger ones too: the half percent of tokens at which most features fire would take most of
    the width.
    """
    parts = []
    for head, group in frame.groupby("head"):
        tail = 1 - group.sort_values("L0").groupby("name")["share"].cumsum()
        last = int(group.loc[tail > 0.005, "L0"].max() + 1 if (tail > 0.005).any() else 0)
        width = last // bins + 1
        starts = group.assign(start=group["L0"].clip(upper=last) // width * width)
        shares = starts.groupby(["name", "start"])["share"].sum().unstack("start", fill_value=0.0)
        shares[last // width * width + width] = 0.0  # a step needs a start at which it falls to 0
        long = shares.melt(value_name="share", ignore_index=False).reset_index()
        parts.append(long.assign(head=head, end=long["start"] + width))
    return pd.concat(parts, ignore_index=True)
