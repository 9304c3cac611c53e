"""The command line: `python -m trainer --help`."""

import dataclasses
import os
import signal
import sys

import jsonargparse

from trainer.config import ActivationsConfig, SAEConfig, TrainingConfig

_GROUPS = (ActivationsConfig, SAEConfig, TrainingConfig)


def build_parser() -> jsonargparse.ArgumentParser:
    """One flag per field of the three config dataclasses, with its docstring as help."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m trainer",
        usage="python -m trainer [options]",
        description="Train block-diagonal sparse autoencoders on the attention-head outputs of a language model.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    for group in _GROUPS:
        parser.add_class_arguments(group)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, train, and turn every foreseeable failure into one sentence. Returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv).as_dict()
    # `kill` is Ctrl-C: the training loop saves, everything else stops at once.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        configs = [group(**{f.name: options[f.name] for f in dataclasses.fields(group)}) for group in _GROUPS]
        # torch and transformer_lens take seconds to import: a wrong option should not wait for them.
        from trainer.train import Interrupted, train
    except ValueError as error:
        return _refuse(error)
    try:
        train(*configs)
    except Interrupted as stop:
        print(f"Saved: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("Stopped. Activations harvested and steps saved so far are kept.", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
