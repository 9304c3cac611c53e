"""Trainings as their checkpoint directories tell them: how far they are, whether they live, where W&B has them."""

import os
from pathlib import Path
from typing import Any

import pandas as pd

from trainer.checkpoint import Checkpoint, CheckpointError
from trainer.config import TrainingConfig
from trainer.locks import is_locked
from trainer.run import saved_steps

_PATIENCE = 5  # a run that logs nothing for so many times its usual interval is stopped or stalled
_FIRST_LINE, _EVALUATION = 300, 3600  # seconds that its first line, and evaluating, may take
SHOWN = ("L0", "FVU", "loss")  # figures of a log line that every recipe has


def progress(checkpoints: list[Checkpoint], now: float) -> pd.DataFrame:
    """One row per checkpoint: its state, steps, speed, last logged figures, and until it is complete the age in seconds
    of its last line.

    States: complete, imported, training, evaluating, or stopped: no process holds its lock and its last line is old
    (a lock on another machine may not be seen).
    """
    rows = []
    for checkpoint in checkpoints:
        config, training = checkpoint.config, _training(checkpoint)
        try:
            lines, damaged = checkpoint.metrics(), False
        except CheckpointError:
            lines, damaged = [], True
        last = lines[-1] if lines else {}
        total = training and training.total_training_steps
        step = last.get("step", config.steps)
        log = checkpoint.path / "metrics.jsonl"
        age = now - os.path.getmtime(log if os.path.exists(log) else checkpoint.path / "config.json")
        rows.append(
            {
                "name": checkpoint.name,
                "state": "damaged log" if damaged else _state(checkpoint, last, age),
                "step": step,
                "steps": total,
                "done": step / total if total and step is not None else None,
                "tokens_per_second": last.get("tokens_per_second"),
                **{key: last.get(key) for key in SHOWN},
                "last_line": None if checkpoint.is_complete else age,
                "left": _left(checkpoint, last),
            }
        )
    frame = pd.DataFrame(rows)
    numeric = [column for column in map(str, frame) if column not in ("name", "state")]
    frame[numeric] = frame[numeric].apply(pd.to_numeric)
    return frame


def _training(checkpoint: Checkpoint) -> TrainingConfig | None:
    options = checkpoint.config.options
    return options.training if options else None


def _state(checkpoint: Checkpoint, last: dict[str, Any], age: float) -> str:
    training = _training(checkpoint)
    if training is None:
        return "imported"
    if checkpoint.is_complete:
        return "complete"
    lives = is_locked(checkpoint.path)
    if last and last["step"] >= training.total_training_steps:
        return "evaluating" if lives or age < _EVALUATION else "stopped"
    speed = last.get("tokens_per_second")
    usual = training.log_every * training.batch_size / speed if speed else 0
    return "training" if lives or age < (max(60, _PATIENCE * usual) if speed else _FIRST_LINE) else "stopped"


def _left(checkpoint: Checkpoint, last: dict[str, Any]) -> float | None:
    """Seconds of training that are left at the last speed."""
    speed, training = last.get("tokens_per_second"), _training(checkpoint)
    if checkpoint.is_complete or not speed or training is None:
        return None
    return (training.total_training_steps - last["step"]) * training.batch_size / speed


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
