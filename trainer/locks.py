"""One process at a time writes a checkpoint directory."""

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(paths: list[Path]) -> Iterator[None]:
    """Keep other processes from writing these checkpoint directories.

    The operating system holds the lock, so it ends with its process however that ends. Where the file system has no
    locks the run goes on without.

    Raises:
        ValueError: another process writes one of them; it is named.
    """
    with ExitStack() as held:
        for path in paths:
            file = _lock_file(path)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(file, blocking=False, fallback_to_soft=False))
            except Timeout as error:
                raise ValueError(f"{path} is being trained {_holder(file)}: wait for it, or stop it first") from error
            except (NotImplementedError, OSError) as error:
                print(f"{path} cannot be locked ({error}): do not train it twice at once")
                continue
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            with suppress(OSError):  # no room: the lock holds without a name
                file.write_text(f"by process {os.getpid()} on {socket.gethostname()} since {since}")
        yield


def is_locked(path: Path) -> bool:
    """Whether a process writes this checkpoint directory now."""
    file = _lock_file(path)
    if not file.exists():
        return False
    try:
        with FileLock(file, blocking=False, fallback_to_soft=False):
            return False
    except Timeout:
        return True
    except (NotImplementedError, OSError):
        return False


def holder_here(path: Path) -> int | None:
    """The process of this machine that writes this checkpoint directory now; None where none does, or none is named."""
    if not is_locked(path):
        return None
    found = re.fullmatch(r"by process (\d+) on (.+) since .*", _holder(_lock_file(path)))
    return int(found[1]) if found and found[2] == socket.gethostname() else None


def _lock_file(path: Path) -> Path:
    return path.parent / ".runs" / f"{path.name}.lock"


def _holder(file: Path) -> str:
    try:
        return file.read_text() or "by another process"
    except OSError:
        return "by another process"
