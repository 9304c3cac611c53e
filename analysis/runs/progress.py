"""Trainings as their checkpoint directories tell them: how far they are, whether they live, where W&B has them."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from trainer import checkpoint
from trainer.run import saved_steps

_PATIENCE = 5  # a run that logs nothing for so many times its usual interval is stopped or stalled
_FIRST_LINE, _EVALUATION = 300, 3600  # seconds that its first line, and evaluating, may take
SHOWN = ("L0", "FVU", "loss")  # figures of a log line that every recipe has


def progress(listed: list[checkpoint.Listed], now: float) -> pd.DataFrame:
    """One row per checkpoint: its state, steps, speed, last logged figures, and until it is complete the age in seconds
    of its last line.

    States: complete, imported, training, evaluating, or stopped, which is concluded from the age of the last line.
    """
    rows = []
    for path, config, _ in listed:
        if config is None:
            continue
        try:
            lines, damaged = checkpoint.load_metrics(path), False
        except checkpoint.CheckpointError:
            lines, damaged = [], True
        last = lines[-1] if lines else {}
        training = config["training"]
        total = training.get("total_training_steps")
        step = last.get("step", config.get("steps"))
        log = path / "metrics.jsonl"
        age = now - (log if log.exists() else path / "config.json").stat().st_mtime
        rows.append(
            {
                "name": path.name,
                "state": "damaged log" if damaged else _state(config, last, age),
                "step": step,
                "steps": total,
                "done": step / total if total and step is not None else None,
                "tokens_per_second": last.get("tokens_per_second"),
                **{key: last.get(key) for key in SHOWN},
                "last_line": None if config["status"] == "complete" else age,
                "left": _left(config, last),
            }
        )
    frame = pd.DataFrame(rows)
    numeric = [column for column in frame if column not in ("name", "state")]
    frame[numeric] = frame[numeric].apply(pd.to_numeric)
    return frame


def _state(config: dict[str, Any], last: dict[str, Any], age: float) -> str:
    if config.get("imported_from"):
        return "imported"
    if config["status"] == "complete":
        return "complete"
    training = config["training"]
    if last and last["step"] >= training.get("total_training_steps", math.inf):
        return "evaluating" if age < _EVALUATION else "stopped"
    speed = last.get("tokens_per_second")
    usual = training["log_every"] * training["batch_size"] / speed if speed else 0
    return "training" if age < (max(60, _PATIENCE * usual) if speed else _FIRST_LINE) else "stopped"


def _left(config: dict[str, Any], last: dict[str, Any]) -> float | None:
    """Seconds of training that are left at the last speed."""
    speed, training = last.get("tokens_per_second"), config["training"]
    if config["status"] == "complete" or not speed:
        return None
    return (training["total_training_steps"] - last["step"]) * training["batch_size"] / speed


def saved_step(path: Path) -> int:
    """The step from which an interrupted run goes on; 0 where it begins anew."""
    return max(saved_steps(path), default=0)


def unsent(path: Path) -> list[Path]:
    """Folders of offline W&B runs of a checkpoint, which `wandb sync` sends."""
    return sorted((path / "wandb").glob("offline-run-*"))


def ago(seconds: float) -> str:
    """A duration in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
