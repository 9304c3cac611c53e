"""Where the figures of a run go: metrics.jsonl always, Weights & Biases where it is wanted."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint import Config, read_metrics
from trainer.files import write_atomically
from trainer.tracking import Mode, Tracked


class MetricsLog:
    """Appends one line per logged step to `metrics.jsonl` and sends the same figures to W&B.

    Args:
        path: the checkpoint directory.
        steps_done: lines of later steps are dropped first (they were logged after the last save).
        mode: as `reachable` found it; what breaks later ends the sending, never the run.
        project: as W&B has it.
        config: of the checkpoint; the runs of one sweep share a group.
    """

    def __init__(self, path: Path, steps_done: int, mode: Mode, project: str, config: Config) -> None:
        self._file = path / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= steps_done]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self._file, lambda p: p.write_text(text))
        self._wandb = Tracked(
            path, mode, project=project, group=config.group, id=config.wandb_id, resume="allow", config=asdict(config)
        )

    @property
    def url(self) -> str | None:
        """Where W&B shows the run; None where it is offline or disabled."""
        return self._wandb.url

    def write(self, line: dict[str, Any], histograms: dict[str, Tensor]) -> None:
        """Append one line; lists (one figure per head) reach W&B as `key/head_0`, `key/head_1`, ...

        Histograms, one value per feature, go to W&B only.
        """
        try:
            with self._file.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(f"{self._file} could not be written: {error}") from error

        def log(run: Any) -> None:
            import wandb

            values = {key: value.flatten().tolist() for key, value in histograms.items()}
            drawn = {f"{key}/features": wandb.Histogram(value) for key, value in values.items()}
            run.log({**_flat(line), **drawn}, step=line["step"])

        self._wandb.send(log)

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the W&B run with the figures of eval.json as its summary."""
        figures = {f"eval/{key}": value for key, value in _flat(summary).items()}
        self._wandb.send(lambda run: run.summary.update(figures))
        self._wandb.send(lambda run: run.finish())


def _flat(line: dict[str, Any]) -> dict[str, float]:
    figures = dict(line)
    for key, value in line.items():
        if isinstance(value, list):
            figures |= {f"{key}/head_{head}": each for head, each in enumerate(value)}
    return {key: value for key, value in figures.items() if isinstance(value, int | float)}
