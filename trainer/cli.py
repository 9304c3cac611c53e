"""The command line: its options, what is built of them, and how every command of this project ends."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields
from functools import lru_cache
from typing import Any

import jsonargparse

from trainer import ranks
from trainer.config import ActivationsConfig, SAEConfig, SAEOptions, TrainingConfig, require
from trainer.interrupts import Interrupted

CHECKPOINT = "checkpoint directory, or hf://OWNER/REPO/NAME of the Hugging Face hub"  # `sharing.pull.located`
GROUPS = (ActivationsConfig, SAEOptions, TrainingConfig)


def parser() -> jsonargparse.ArgumentParser:
    """One flag per field of the config dataclasses, with its docstring as help."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    found = jsonargparse.ArgumentParser(
        prog="python -m trainer",
        usage="python -m trainer [options]",
        description="Train block-diagonal sparse autoencoders on the attention-head outputs of a language model.",
    )
    found.add_argument("--config", action="config", help="YAML file with any of the options below.")
    for group in GROUPS:
        found.add_class_arguments(group)
    found.add_argument(
        "--points",
        type=list[dict[str, Any]] | None,
        help="Further SAEs, for a YAML file: each entry is a set of the SAE options here, over those given outside it.",
    )
    return found


def build(options: dict[str, Any]) -> tuple[ActivationsConfig, list[SAEConfig], TrainingConfig]:
    """What is decided of the options of `parser`; those that are left out have their defaults.

    Raises:
        ValueError: an option is wrong or unknown, or two SAEs are the same.
    """
    activations, asked, training = (
        {each.name: options[each.name] for each in fields(group) if each.name in options} for group in GROUPS
    )
    points = options.get("points")
    require(points != [], "points is empty: name at least one")
    read = ActivationsConfig(**activations)

    def n_layers() -> int:
        from trainer.model.loading import n_layers  # takes seconds to import

        return n_layers(read.model)

    saes = [sae for entry in points or [{}] for sae in SAEOptions(**asked | _checked(entry)).decide(n_layers)]
    require(len(set(saes)) == len(saes), "the sweep names the same SAE twice")
    return read, saes, TrainingConfig(**training)


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """One of `points`, with its types checked as those of flags are."""
    unknown = sorted(set(entry) - {each.name for each in fields(SAEOptions)})
    require(not unknown, f"points: unknown option {', '.join(unknown)}")
    checked = {}
    for key, value in entry.items():
        try:
            checked[key] = _types().parse_object({key: value}, defaults=False)[key]
        except jsonargparse.ArgumentError as error:
            raise ValueError(f"points: {key} cannot be {value!r}") from error
    return checked


@lru_cache(maxsize=1)
def _types() -> jsonargparse.ArgumentParser:
    """What a field of `SAEOptions` may be."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SAEOptions)
    return parser


def add_places(parser: argparse.ArgumentParser) -> None:
    """--model and --text, for commands that open what a checkpoint was trained on."""
    parser.add_argument("--model", help="Where the model trained on lies now, if it was moved: a folder or a name.")
    parser.add_argument("--text", help="Where the text trained on lies now, if it was moved.")


def status(
    run: Callable[[], object], stopped: str = "Stopped; nothing was written.", many_processes: bool = False
) -> int:
    """Run a command and return its exit status: 0, 130 where it was stopped, or 2 where it cannot be done.

    Every foreseeable failure is one sentence; what nobody foresaw keeps its traceback. What several processes under
    torchrun have to say is said once.

    Args:
        stopped: what to say where it was stopped without having saved.
        many_processes: whether it shares its work; else they would write the same files.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` is Ctrl-C
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if ranks.asked() > 1 and not many_processes:
            raise ValueError("this command runs in one process: start it without torchrun")
        with _quiet_but_first():
            run()
    except Interrupted as stop:
        _say(f"Saved: {stop}")
        return 130
    except KeyboardInterrupt:
        _say(stopped, if_alone=True)
        return 130
    except ranks.Lost as error:
        _say(f"error: {error}", if_alone=True)
        return 2
    except (ValueError, RuntimeError, OSError) as error:
        _say(f"error: {error}")
        return 2
    finally:
        if ranks.asked() > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which torchrun ends those whose end has begun
    return 0


def _say(sentence: str, if_alone: bool = False) -> None:
    if ranks.says(sentence, if_alone):
        print(sentence, file=sys.stderr)


@contextmanager
def _quiet_but_first() -> Iterator[None]:
    """The others have nothing else to say than the first process."""
    if ranks.is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
