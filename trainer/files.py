"""Files that a reader sees whole or not at all, JSON that is checked against a type, and the folder for what can be
made again."""

import glob
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

_PARTIAL = re.compile(r"\..+\.(\d+)\.partial")
_LARGEST_JSON = 2**23  # bytes; parsed, lists of lists take 45 times as much


def cache_dir() -> Path:
    """Folder for the converted embedded model and for activations; ATTN_SAES_CACHE moves it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ATTN_SAES_CACHE") or Path(root) / "attn-saes")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a name beside `path`, then move the result into place; what a killed process left there goes.

    Raises:
        OSError: it cannot be written, also where safetensors says so by an error of its own; the file is named.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    sweep(path.parent, path.name)
    try:
        write(partial)
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def make_writable(folder: Path) -> None:
    """Make a folder, where there is none, and see that files can be written there: before hours of work, not after.

    Raises:
        ValueError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"nothing can be written to {folder}: {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step; NaN and infinity are refused, so every reader can parse it."""
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n"))


def require_file(path: Path) -> os.stat_result:
    """What the system says of a regular file: a pipe would be waited for, and a device has no end.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is something else, or may not be read (which safetensors calls a file that is not there).
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no file")
    if not os.access(path, os.R_OK):
        raise PermissionError("it may not be read")
    return found


def flaw(path: Path, error: Exception) -> str:
    """Why a file cannot be used: what may not be read is not called damaged, it may be as good as ever."""
    denied = any(isinstance(each, PermissionError) for each in (error, error.__cause__))
    return f"{path} may not be read" if denied else f"{path} is damaged ({error})"


def read_json(path: Path, kind: Any) -> Any:
    """A JSON file as `kind`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, is no JSON, or not of that kind.
    """
    return parse_json(read_description(path), kind)


def read_description(path: Path) -> bytes:
    """A file that describes others: small, and read whole.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or is too large to be one.
    """
    try:
        if require_file(path).st_size > _LARGEST_JSON:
            raise ValueError(f"it is larger than {_LARGEST_JSON >> 20} MB")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def parse_json(data: bytes, kind: Any) -> Any:
    """JSON as `kind`: a number is never taken for a string, nor null, NaN or infinity for a number.

    Raises:
        ValueError: it is no JSON (`msgspec.ValidationError`: JSON, but not of that kind).
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def save_tensors(path: Path, tensors: dict[str, Tensor], what: str = "") -> None:
    """Write a safetensors file with a checksum of its tensors.

    Args:
        what: what the tensors are, so that a file under another's name is noticed.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda p: save_file(tensors, p, {"checksum": _checksum(tensors), "what": what}))


def load_tensors(path: Path, what: str = "") -> dict[str, Tensor]:
    """What `save_tensors` wrote.

    Raises:
        ValueError: the file cannot be read, its content has changed, or it is another file than its name says.
    """
    try:
        require_file(path)
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(flaw(path, error)) from error
    if meta.get("checksum") != _checksum(tensors):
        raise ValueError(f"{path} is damaged (its content does not match its checksum)")
    if meta.get("what") != what:
        raise ValueError(f"{path} is another file than its name says")
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 of names, types, shapes and values: it finds accidents, at the speed of reading."""
    found = 0
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(uint8).numpy().data, found)
    return f"{found:08x}"


def sweep(folder: Path, name: str | None = None) -> None:
    """Delete what `write_atomically` of processes that are no more left in a folder, of one file or of all."""
    for path in folder.glob(f".{glob.escape(name) if name else '*'}.*.partial"):
        found = _PARTIAL.fullmatch(path.name)
        if found and not _is_alive(int(found[1])):
            with suppress(OSError):
                path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` that takes its place in the end; after an error nothing is left.

    Raises:
        ValueError: `path` exists, or nothing can be written beside it.
    """
    if path.exists():
        raise ValueError(f"{path} exists already: choose another name")
    make_writable(path.parent)
    with TemporaryDirectory(dir=path.parent, prefix=".new-") as hidden:
        partial = Path(hidden) / path.name
        partial.mkdir()
        yield partial
        partial.rename(path)
