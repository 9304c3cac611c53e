"""Command lines of `python -m trainer`, from a config.json or from a form; each is checked by reading it back."""

import shlex
import threading
from dataclasses import MISSING, fields, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainer.__main__ import build_parser
from trainer.config import ActivationsConfig, TrainingConfig, require
from trainer.recipes import LISTED, TOP_K, SAEConfig, SweepConfig
from trainer.run import plan

_NOT_REPEATED = ("name", "out", "resume")  # said for each command
_parsing = threading.Lock()  # sessions share the parser


def shell(arguments: list[str]) -> str:
    """A training command as one pastes it beside app.py."""
    return f"python -m trainer {shlex.join(arguments)}"


def repeat(config: dict[str, Any], name: str, out: str) -> list[str]:
    """Arguments that train the SAE of a config.json once more, in a new directory.

    Args:
        config: config.json of a checkpoint.
        name, out: the new directory and its folder.

    Raises:
        ValueError: it was not trained by this program, or not with options that a command line can say.
    """
    return _write({**_options(config), **_place(name, out)})


def resume(config: dict[str, Any], name: str, out: str) -> list[str]:
    """Arguments that go on with the interrupted training of a config.json in its own directory.

    Raises:
        ValueError: as `repeat`.
    """
    return _write({**_options(config), **_place(name, out), "resume": True})


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
    activations, saes, training = build(options)
    # Elsewhere, where nothing exists: a form that is looked at writes nothing into the folder.
    with TemporaryDirectory() as empty:
        names = [run.path.name for run in plan(activations, saes, replace(training, out=empty))]
    for name in names:
        require(not (folder / name).exists(), f"{name} exists already: choose another name")
    return _write({**options, "out": out} if out != defaults["out"] else options), names


def build(options: dict[str, Any]) -> tuple[ActivationsConfig, list[SAEConfig], TrainingConfig]:
    """What `python -m trainer` makes of its options; those that are left out have their defaults.

    Raises:
        ValueError: a dataclass refuses one.
    """
    activations, sweep, training = (
        group(**{each.name: options[each.name] for each in fields(group) if each.name in options})
        for group in (ActivationsConfig, SweepConfig, TrainingConfig)
    )
    return activations, sweep.expand({each.name: options.get(each.name) for each in fields(SAEConfig)}), training


def numbers(text: str, kind: type, what: str) -> Any:
    """The numbers of a text field, separated by commas: None, one, or a list.

    Raises:
        ValueError: one is not a number.
    """
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        kinds = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{what} must be {kinds} separated by commas, got {text!r}") from None
    return found if len(found) > 1 else found[0] if found else None


def explanations() -> dict[str, str]:
    """The sentence of `--help` for every option."""
    return {action.dest: action.help for action in _parser()._actions if action.help}


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """What differs from the defaults of the program, of the preset and of the recipe, in the training of a config."""
    imported = config.get("imported_from")
    require(not imported, f"it was imported from {imported}: how it was trained is not known here")
    stored, defaults = config["training"], _defaults()
    own = [each.name for each in fields(ActivationsConfig) + fields(TrainingConfig) if each.name not in _NOT_REPEATED]
    options = {key: stored[key] for key in own if key in stored and stored[key] != defaults[key]}
    sae = {each.name: stored.get(each.name) for each in fields(SAEConfig)}
    sparsity = "k" if sae["recipe"] in TOP_K else "l1_coefficient"
    # A recipe and its sparsity are always named, for the reader; a preset names its recipe.
    named = {key: sae[key] for key in ("preset", "recipe", "hook_layer", "label", sparsity)}
    implied = SAEConfig.resolve(**named)
    differing = {key: value for key, value in sae.items() if key not in named and value != getattr(implied, key)}
    if sae["preset"] and SAEConfig.resolve(preset=sae["preset"], hook_layer=0).recipe == sae["recipe"]:
        del named["recipe"]
    if named["hook_layer"] == defaults["hook_layer"]:
        del named["hook_layer"]
    if "l1_coefficient" in named:
        named["l1_coefficients"] = named.pop("l1_coefficient")
    return {key: value for key, value in {**named, **differing, **options}.items() if value is not None}


def _place(name: str, out: str) -> dict[str, str]:
    return {"name": name} if out == _defaults()["out"] else {"out": out, "name": name}


@lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    """Of every option of the command line."""
    groups = fields(ActivationsConfig) + fields(SweepConfig) + fields(TrainingConfig)
    own = {each.name: None for each in fields(SAEConfig) if each.name not in LISTED}
    return own | {each.name: None if each.default is MISSING else each.default for each in groups}


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
        raise ValueError(f"the command line does not take this: {str(error).splitlines()[0]}") from error
    for key, value in options.items():
        require(read[key] == value, f"{key} {value!r} cannot be said on a command line, only in a YAML file (--config)")
    return arguments


@lru_cache(maxsize=1)
def _parser() -> Any:
    parser = build_parser()
    parser.exit_on_error = False
    return parser


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
