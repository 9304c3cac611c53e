"""Where the figures of a run go: metrics.jsonl always, Weights & Biases where it is wanted."""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from trainer.checkpoint import Config, read_metrics
from trainer.files import write_atomically

Mode = Literal["online", "offline", "disabled"]

_PATIENCE = 10  # seconds that W&B may take to answer
_SENDING = 60  # seconds that it may take at the end to receive what is left


def reachable(mode: Mode | None) -> Mode:
    """How W&B can be used, known within ten seconds: where it is down, slow or refuses the key, offline.

    Args:
        mode: as asked; None for online where a key is set and offline elsewhere.
    """
    if mode in ("offline", "disabled"):
        return mode
    import wandb  # a second to import, so only when used

    outcome: list[bool | Exception] = []

    def log_in() -> None:
        try:
            outcome.append(wandb.login(prompt=False))
        except Exception as error:  # whatever it is, it must not cost the run
            outcome.append(error)

    thread = threading.Thread(target=log_in, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    found = outcome[0] if outcome else TimeoutError(f"no answer within {_PATIENCE} s")
    if found is True:
        return "online"
    if found is not False or mode == "online":
        _say_offline(found or "not logged in")
    return "offline"


def _say_offline(why: object) -> None:
    print(f"W&B cannot be used ({why}): its files are kept offline, `wandb sync` sends them later", flush=True)


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
        self._run = None
        if mode != "disabled":
            import wandb

            open_run = partial(
                wandb.init, project=project, group=config.group, name=path.name, id=config.wandb_id, resume="allow",
                config=asdict(config), dir=path,
                reinit="create_new",  # several SAEs of one process, each with a run of its own
                settings=wandb.Settings(
                    silent=True, console="off", init_timeout=_PATIENCE, finish_timeout=_SENDING
                ),
            )  # fmt: skip
            try:
                self._run = open_run(mode=mode)
            except wandb.Error as error:
                _say_offline(error)
                self._run = open_run(mode="offline")

    @property
    def url(self) -> str | None:
        """Where W&B shows the run; None where it is offline or disabled."""
        return None if self._run is None else self._run.url

    def write(self, line: dict[str, Any], histograms: dict[str, Tensor]) -> None:
        """Append one line; lists (one figure per head) reach W&B as `key/head_0`, `key/head_1`, ...

        Histograms, one value per feature, go to W&B only.
        """
        try:
            with self._file.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(f"{self._file} could not be written: {error}") from error
        if self._run is not None:
            import wandb

            values = {key: value.flatten().tolist() for key, value in histograms.items()}
            drawn = {f"{key}/features": wandb.Histogram(value) for key, value in values.items()}
            sent = {**_flat(line), **drawn}
            self._send(lambda run: run.log(sent, step=line["step"]))

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the W&B run with the figures of eval.json as its summary."""
        figures = {f"eval/{key}": value for key, value in _flat(summary).items()}
        self._send(lambda run: run.summary.update(figures))
        self._send(lambda run: run.finish())

    def _send(self, what: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            what(self._run)
        except Exception as error:  # its disk, its network or its process: none is worth the run
            print(f"W&B receives no more figures of {self._file.parent.name} ({error})", flush=True)
            self._run = None


def _flat(line: dict[str, Any]) -> dict[str, float]:
    figures = dict(line)
    for key, value in line.items():
        if isinstance(value, list):
            figures |= {f"{key}/head_{head}": each for head, each in enumerate(value)}
    return {key: value for key, value in figures.items() if isinstance(value, int | float)}
