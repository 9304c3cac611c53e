"""The command line: `python -m trainer --help`."""

import dataclasses
import os
import signal
import sys
from typing import Any

import jsonargparse

from trainer.config import ActivationsConfig, TrainingConfig
from trainer.interrupts import Interrupted
from trainer.recipes import LISTED, SAEConfig, SweepConfig

_GROUPS = (ActivationsConfig, SweepConfig, SAEConfig, TrainingConfig)


def build_parser() -> jsonargparse.ArgumentParser:
    """One flag per field of the config dataclasses, with its docstring as help."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m trainer",
        usage="python -m trainer [options]",
        description="Train block-diagonal sparse autoencoders on the attention-head outputs of a language model.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    for group in _GROUPS:
        parser.add_class_arguments(group, skip=LISTED if group is SAEConfig else set())
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, train, and turn every foreseeable failure into one sentence. Returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv).as_dict()
    # `kill` is Ctrl-C: the training loop saves, everything else stops at once.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        activations = _build(ActivationsConfig, options)
        sweep = _build(SweepConfig, options)
        training = _build(TrainingConfig, options)
        saes = sweep.expand({field.name: options.get(field.name) for field in dataclasses.fields(SAEConfig)})
        # torch and transformer_lens take seconds to import: a wrong option should not wait for them.
        from trainer.train import train
    except ValueError as error:
        return _refuse(error)
    try:
        train(activations, saes, training)
    except Interrupted as stop:
        print(f"Saved: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("Stopped. Activations harvested and steps saved so far are kept.", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        return _refuse(error)
    return 0


def _build(group: type, options: dict[str, Any]) -> Any:
    return group(**{field.name: options[field.name] for field in dataclasses.fields(group)})


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
