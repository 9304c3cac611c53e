"""Files that a reader sees whole or not at all, JSON that is checked against a type, and the folder for what can be
made again."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError

_LARGEST_JSON = 2**26  # bytes; parsed it takes several times as much


def cache_dir() -> Path:
    """Folder for the converted embedded model and for activations; ATTN_SAES_CACHE moves it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ATTN_SAES_CACHE") or Path(root) / "attn-saes")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a name beside `path`, then move the result into place.

    Raises:
        OSError: it cannot be written, also where safetensors says so by an error of its own.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step; NaN and infinity are refused, so every reader can parse it."""
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n"))


def require_file(path: Path) -> os.stat_result:
    """What the system says of a regular file: a pipe would be waited for, and a device has no end.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is something else, or cannot be reached.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no file")
    return found


def read_json(path: Path, kind: Any) -> Any:
    """A JSON file as `kind`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, is no JSON, or not of that kind.
    """
    try:
        if require_file(path).st_size > _LARGEST_JSON:
            raise ValueError(f"it is larger than {_LARGEST_JSON >> 20} MB")
        return parse_json(path.read_bytes(), kind)
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


def one_line(text: str, most: int = 480) -> str:
    """A text as every terminal, page and log can show it: on one line, what cannot be encoded escaped, the middle of a
    long one left out."""
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    half = most // 2 - 3
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"
