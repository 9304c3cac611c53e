"""The checkpoint directory: the only contract between training and looking.

    config.json          what was trained, on what, by which versions, and how far it got
    sae.safetensors      W_enc b_enc W_dec b_dec (and threshold), ready for raw hook_z
    metrics.jsonl        one line per logged step
    eval.json            held-out metrics
    training_state/      what exact resuming needs; dropped when the run completes
    analysis/            written later by `python -m analysis`

Nothing is pickled. Every file is written beside its name and moved into place.
"""

import json
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.block_diag import BlockDiagSAE

SCHEMA_VERSION = 2
_SHAPE = ("n_heads", "d_head", "features_per_head", "activation", "k", "k_scope")
_PACKAGES = ("torch", "transformer-lens", "transformers", "safetensors", "numpy")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the reason."""


class Listed(NamedTuple):
    """One directory of a checkpoint folder: its config, or why it cannot be read."""

    path: Path
    config: dict[str, Any] | None
    error: str | None


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a name beside `path`, then move the result into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step; NaN and infinity are refused, so every reader can parse it."""
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n"))


def save(path: Path, sae: BlockDiagSAE, config: dict[str, Any]) -> None:
    """Write `sae.safetensors` and `config.json`.

    Args:
        path: the checkpoint directory, made if needed.
        sae: weights for raw hook_z (scales folded in).
        config: JSON-ready description: model, hook, text, recipe, seed, tokens seen, ...
    """
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.named_parameters()}
    write_atomically(path / "sae.safetensors", lambda p: save_file(tensors, p))
    save_config(path, sae, config)


def save_config(path: Path, sae: BlockDiagSAE, config: dict[str, Any]) -> None:
    """Write `config.json` alone, with the SAE's sizes and the package versions added."""
    shape = {key: getattr(sae, key) for key in _SHAPE}
    full = {"schema_version": SCHEMA_VERSION, "sae": shape, **config, "versions": versions()}
    write_json(path / "config.json", full)


def load(path: Path | str) -> tuple[BlockDiagSAE, dict[str, Any]]:
    """Read an SAE and its config.

    Raises:
        CheckpointError: a file is missing, damaged, of another schema version, or disagrees with the config.
    """
    path = Path(path)
    config = load_config(path)
    file = path / "sae.safetensors"
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: the run has not saved weights yet") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    try:
        sae = BlockDiagSAE(**{key: config["sae"][key] for key in _SHAPE})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'} does not describe an SAE: {error}") from error
    expected = {name: tuple(p.shape) for name, p in sae.named_parameters()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != expected:
        raise CheckpointError(f"{file} holds {found}, but config.json describes {expected}")
    if not all(torch.isfinite(t).all() for t in tensors.values()):
        raise CheckpointError(f"{file} holds values that are not finite")
    sae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return sae.eval().requires_grad_(False), config


def load_config(path: Path | str) -> dict[str, Any]:
    """Read config.json.

    Raises:
        CheckpointError: it is missing, damaged or of another schema version.
    """
    file = Path(path) / "config.json"
    config = _read_json(file)
    found = config.get("schema_version") if isinstance(config, dict) else None
    if found != SCHEMA_VERSION:
        raise CheckpointError(f"{file} has schema version {found}, this program reads {SCHEMA_VERSION}")
    for key in ("sae", "model", "text", "training", "status"):
        if key not in config:
            raise CheckpointError(f"{file} has no {key!r}")
    return config


def load_eval(path: Path | str) -> dict[str, Any] | None:
    """Read eval.json, or None where the run has not been evaluated yet.

    Raises:
        CheckpointError: it is damaged.
    """
    file = Path(path) / "eval.json"
    return _read_json(file) if file.exists() else None


def load_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line that is still being written is left out."""
    file = Path(path) / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def list_checkpoints(folder: Path | str) -> list[Listed]:
    """Every directory of `folder` that looks like a checkpoint, readable or not, by name."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        try:
            config = load_config(path)
            weights = path / "sae.safetensors"
            if config["status"] == "complete" and not weights.exists():
                raise CheckpointError(f"{weights} is missing")
            load_eval(path)
            found.append(Listed(path, config, None))
        except CheckpointError as error:
            found.append(Listed(path, None, str(error)))
    return found


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
