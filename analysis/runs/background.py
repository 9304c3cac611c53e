"""Training commands that a server runs in the background, beside what it serves."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint import Checkpoint, CheckpointError
from trainer.locks import holder_here, is_locked

AT_ONCE = 2  # trainings of one server: more would slow each other down, and whoever looks
EARLIER = 10  # trainings of earlier servers that are told of
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Process(NamedTuple):
    """One command that was started: the checkpoints it makes, and where its output goes."""

    names: list[str]
    log: Path
    when: float
    """it was started; where an earlier server did that, when it last said something"""
    popen: subprocess.Popen | None
    """None where an earlier server started it: then the lock tells whether it runs, and its checkpoint how it ended"""

    @property
    def state(self) -> str:
        """Running, or how it ended."""
        if self.popen is None:
            if is_locked(self._path):
                return "running"
            return "complete" if _is_complete(self._path) else "ended"
        status = self.popen.poll()
        if status is None:
            return "running"
        # 130 is the trainer's own after SIGTERM: it has saved.
        return {0: "complete", 130: "stopped", -15: "stopped"}.get(status, f"failed with status {status}")

    @property
    def pid(self) -> int | None:
        """None where it has ended under another server, or runs on another machine."""
        return self.popen.pid if self.popen else holder_here(self._path)

    def cancel(self) -> None:
        """SIGTERM, where it runs: it saves and ends."""
        if self.popen:
            self.popen.terminate()
        elif pid := self.pid:
            with suppress(OSError):  # it has just ended, or is another user's
                os.kill(pid, signal.SIGTERM)

    @property
    def _path(self) -> Path:
        return self.log.parents[1] / self.names[0]


class Processes:
    """The commands started by this server, for all its sessions. They outlive a session, and the server too: those of
    an earlier one are found by their logs."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._started: dict[str, Process] = {}

    def start(self, arguments: list[str], names: list[str], folder: Path, root: Path) -> Process:
        """Run `python -m trainer` with these arguments, without a shell.

        Args:
            arguments: from `analysis.commands`.
            names: the checkpoints that it makes.
            folder: the checkpoint folder; the output goes to `.runs/<first name>.log` in it.
            root: the folder that holds `trainer/`.

        Raises:
            ValueError: one of the checkpoints is being trained, `AT_ONCE` trainings run, or the log cannot be written.
        """
        with self._lock:
            for other in self._started.values():
                same = sorted(set(other.names) & set(names))
                if same and other.state == "running":
                    raise ValueError(f"{same[0]} is being trained already")
            for name in names:  # by a command that was typed, or that this server started before it was restarted
                if is_locked(folder / name):
                    raise ValueError(f"{name} is being trained already")
            running = [other.names[0] for other in self.all(folder) if other.state == "running"]
            if len(running) >= AT_ONCE:
                which = ", ".join(running)
                raise ValueError(f"{AT_ONCE} trainings at once are the limit ({which}): cancel one or wait for its end")
            log = folder / ".runs" / f"{names[0]}.log"
            command = [sys.executable, "-m", "trainer", *arguments]
            try:
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("ab") as output:  # a continuation is added to what it continues
                    popen = subprocess.Popen(
                        command,
                        cwd=root,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, "PYTHONUNBUFFERED": "1"},
                        start_new_session=True,  # Ctrl-C for the server is not meant for the training
                    )
            except OSError as error:
                raise ValueError(f"the training cannot be started: {error}") from error
            process = Process(names, log, time.time(), popen)
            self._started[names[0]] = process
            return process

    def all(self, folder: Path) -> list[Process]:
        """The last command of every name, what runs first, then the newest; of earlier servers a few."""
        with self._lock:
            started = list(self._started.values())
        known = {name for process in started for name in process.names}
        earlier = []
        for log in (folder / ".runs").glob("*.log"):
            with suppress(OSError):  # it has just been deleted
                if log.stem not in known:
                    earlier.append(Process([log.stem], log, log.stat().st_mtime, None))

        def order(process: Process) -> tuple[bool, float]:
            return process.state != "running", -process.when

        earlier = sorted(earlier, key=order)[:EARLIER]
        return sorted(started + earlier, key=order)


def _is_complete(path: Path) -> bool:
    try:
        return Checkpoint(path).is_complete
    except CheckpointError:
        return False


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log; of a progress bar, which overwrites itself, what one would see."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        text = file.read().decode(errors="replace")
    shown = [_ESCAPES.sub("", line.rstrip("\r").split("\r")[-1]) for line in text.rstrip("\n").split("\n")]
    return "\n".join(shown[-lines:])
