"""Weights & Biases: told what happens, and never worth the work that it is told of."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from trainer.errors import first_line

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
        _say_offline(first_line(found) if isinstance(found, Exception) else "not logged in")
    return "offline"


def _say_offline(why: object) -> None:
    print(f"W&B cannot be used ({why}): its files are kept offline, `wandb sync` sends them later", flush=True)


class Tracked:
    """A W&B run; what breaks ends the sending.

    Args:
        path: where its files lie.
        mode: as `reachable` found it.
        described: arguments of `wandb.init`.
    """

    def __init__(self, path: Path, mode: Mode, **described: Any) -> None:
        self._name, self._run = path.name, None
        if mode == "disabled":
            return
        import wandb

        settings = wandb.Settings(silent=True, console="off", init_timeout=_PATIENCE, finish_timeout=_SENDING)
        # Several SAEs of one process, each with a run of its own.
        start = partial(wandb.init, name=path.name, dir=path, reinit="create_new", settings=settings, **described)
        try:
            self._run = start(mode=mode)
        except wandb.Error as error:
            _say_offline(first_line(error))
            self._run = start(mode="offline")

    @property
    def url(self) -> str | None:
        """Where W&B shows the run; None where it is offline or disabled."""
        return None if self._run is None else self._run.url

    def send(self, what: Callable[[Any], object]) -> None:
        """Call `what` with W&B's run, where there is one."""
        if self._run is None:
            return
        try:
            what(self._run)
        except Exception as error:  # its disk, its network or its process
            print(f"W&B receives no more figures of {self._name} ({first_line(error)})", flush=True)
            self._run = None
