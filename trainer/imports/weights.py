"""Tensors out of files of others: nothing in them is run, and nothing larger than the file is allocated."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.config import require
from trainer.errors import first_line
from trainer.files import flaw, require_file


def read_safetensors(file: Path, only: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or one of them where it is there, in float32.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or holds what is no floating point.
    """
    try:
        require_file(file)
        with safe_open(file, framework="pt") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys() if only in (None, name)}  # noqa: SIM118
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except (SafetensorError, OSError, RuntimeError, AttributeError) as error:
        raise ValueError(flaw(file, error)) from error
    return _floats(found, file)


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a dictionary that `torch.save` wrote, in float32, read by torch's weights-only loader.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or holds anything but tensors of floating point.
    """
    try:
        require_file(file)
        # torch stores; what is compressed could be of any size, and would be mapped as it stands.
        with zipfile.ZipFile(file) as archive:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        require(stored, f"{file} is compressed, which torch.save never does")
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is refused: it holds more than tensors, and unpickling that could run any code"
        ) from error
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file} is damaged, or not written by torch.save: {error}") from error
    except PermissionError as error:
        raise ValueError(flaw(file, error)) from error
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{file} is damaged: {first_line(error)}") from error
    return _floats(loaded, file)


def _floats(loaded: Any, file: Path) -> dict[str, Tensor]:
    require(isinstance(loaded, dict), f"{file} holds a {type(loaded).__name__}, not named tensors")
    for name, value in loaded.items():
        require(
            isinstance(name, str)
            and isinstance(value, Tensor)
            and value.layout == torch.strided
            and value.device.type == "cpu"
            and value.is_floating_point()
            and not value.is_quantized,
            f"{file} holds {name!r}, which is no tensor of floating point",
        )
    # A tensor can claim to be larger than its storage by a stride of 0.
    size = sum(value.nbytes for value in loaded.values())
    require(size <= file.stat().st_size, f"{file} claims tensors of {size:,} bytes, which is more than it has")
    return {name: value.detach().float() for name, value in loaded.items()}
