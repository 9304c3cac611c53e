"""Where the figures of a run go: metrics.jsonl always, Weights & Biases where it is wanted."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from trainer.checkpoint import Config, read_metrics
from trainer.files import write_atomically

Mode = Literal["online", "offline", "disabled"]


class MetricsLog:
    """Appends one line per logged step to `metrics.jsonl` and sends the same figures to W&B.

    Args:
        path: the checkpoint directory.
        steps_done: lines of later steps are dropped first (they were logged after the last save).
        mode: "online", "offline", "disabled", or None for online where a key is set and offline elsewhere.
        project: as W&B has it.
        config: of the checkpoint; the runs of one sweep share a group.
    """

    def __init__(self, path: Path, steps_done: int, mode: Mode | None, project: str, config: Config) -> None:
        self._file = path / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= steps_done]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self._file, lambda p: p.write_text(text))
        self._run = None
        if mode != "disabled":
            import wandb  # a second to import, so only when used

            if mode is None:
                mode = "online" if wandb.login(prompt=False) else "offline"
            try:
                self._run = wandb.init(
                    project=project,
                    group=config.group,
                    name=path.name,
                    id=config.wandb_id,
                    resume="allow",
                    config=asdict(config),
                    dir=path,
                    mode=mode,
                    reinit="create_new",  # several SAEs of one process, each with a run of its own
                    settings=wandb.Settings(silent=True, console="off"),
                )
            except wandb.Error as error:
                raise ValueError(f"W&B cannot be used ({error}): try --wandb=offline") from error

    @property
    def url(self) -> str | None:
        """Where W&B shows the run; None where it is offline or disabled."""
        return None if self._run is None else self._run.url

    def write(self, line: dict[str, Any], histograms: dict[str, Tensor]) -> None:
        """Append one line; lists (one figure per head) reach W&B as `key/head_0`, `key/head_1`, ...

        Histograms, one value per feature, go to W&B only.
        """
        with self._file.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._run is not None:
            import wandb

            values = {key: value.flatten().tolist() for key, value in histograms.items()}
            drawn = {f"{key}/features": wandb.Histogram(value) for key, value in values.items()}
            self._run.log({**_flat(line), **drawn}, step=line["step"])

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the W&B run with the figures of eval.json as its summary."""
        if self._run is not None:
            self._run.summary.update({f"eval/{key}": value for key, value in _flat(summary).items()})
            self._run.finish()


def _flat(line: dict[str, Any]) -> dict[str, float]:
    figures = dict(line)
    for key, value in line.items():
        if isinstance(value, list):
            figures |= {f"{key}/head_{head}": each for head, each in enumerate(value)}
    return {key: value for key, value in figures.items() if isinstance(value, int | float)}
