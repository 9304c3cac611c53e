"""Command lines of `python -m trainer`: of a run that is there, or from a form."""

import shlex
import threading
from dataclasses import MISSING, fields, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainer import cli
from trainer.checkpoint import Checkpoint
from trainer.config import require
from trainer.errors import first_line
from trainer.run import plan

_parsing = threading.Lock()  # sessions share the parser


def shell(arguments: list[str]) -> str:
    """A training command as one pastes it beside app.py."""
    return f"python -m trainer {shlex.join(arguments)}"


def repeat(checkpoint: Checkpoint, shown: str, name: str) -> list[str]:
    """Arguments that train an SAE once more, in a new directory of the same folder.

    Args:
        shown: the checkpoint's directory as one types it beside app.py.
        name: of the new directory.

    Raises:
        ValueError: it was not trained by this program, or by a version that wrote no run.yaml.
    """
    return [*_of_run(checkpoint, shown), f"--name={name}"]


def resume(checkpoint: Checkpoint, shown: str) -> list[str]:
    """Arguments that go on with an interrupted training in its own directory.

    Raises:
        ValueError: as `repeat`.
    """
    return [*_of_run(checkpoint, shown), f"--name={checkpoint.name}", "--resume=true"]


def compose(choices: dict[str, Any], folder: Path, out: str) -> tuple[list[str], list[str]]:
    """Arguments that train what a form says, and the names of the checkpoints this makes.

    Args:
        choices: options of `python -m trainer`; None is the default.
        folder: where the checkpoints will be.
        out: that folder, as the command names it.

    Raises:
        ValueError: a choice is refused by the dataclass it belongs to, or a checkpoint of that name exists.
    """
    defaults = _defaults()
    options = {key: value for key, value in choices.items() if value is not None and value != defaults[key]}
    activations, saes, training = cli.build(options)
    # Elsewhere, where nothing exists: a form that is looked at writes nothing into the folder.
    with TemporaryDirectory() as empty, plan(activations, saes, replace(training, out=empty)) as runs:
        names = [run.path.name for run in runs]
    for name in names:
        require(not (folder / name).exists(), f"{name} exists already: choose another name")
    return _write({**options, "out": out} if out != defaults["out"] else options), names


def numbers(text: str, kind: type, what: str) -> Any:
    """The numbers of a text field, separated by commas: None, one, or a list.

    Raises:
        ValueError: one is not a number.
    """
    try:
        read = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        kinds = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{what} must be {kinds} separated by commas, got {text!r}") from None
    return read if len(read) > 1 else read[0] if read else None


def explanations() -> dict[str, str]:
    """The sentence of `--help` for every option."""
    return {action.dest: action.help for action in _parser()._actions if action.help}


def _of_run(checkpoint: Checkpoint, shown: str) -> list[str]:
    imported, file = checkpoint.config.imported, checkpoint.path / "run.yaml"
    require(
        imported is None, f"it was imported from {imported and imported.source}: how it was trained is not known here"
    )
    require(file.exists(), "it has no run.yaml: a version before 0.2 trained it")
    out = str(Path(shown).parent)
    return [f"--config={Path(shown) / 'run.yaml'}", f"--out={out}"]


@lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    """Of every option of the command line."""
    options = [option for group in cli.GROUPS for option in fields(group)]
    return {option.name: None if option.default is MISSING else option.default for option in options}


def _write(options: dict[str, Any]) -> list[str]:
    """The options as arguments, which the command line reads as the same options.

    Raises:
        ValueError: it does not, as a name like `null`.
    """
    arguments = [f"--{key}={_text(value)}" for key, value in options.items()]
    try:
        with _parsing:
            read = _parser().parse_args(arguments).as_dict()
    except Exception as error:
        raise ValueError(f"the command line does not take this: {first_line(error)}") from error
    for key, value in options.items():
        require(read[key] == value, f"{key} {value!r} cannot be said on a command line, only in a YAML file (--config)")
    return arguments


@lru_cache(maxsize=1)
def _parser() -> Any:
    parser = cli.parser()
    parser.exit_on_error = False
    return parser


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
