"""The command line: `python -m trainer --help`."""

import dataclasses
import sys
from typing import Any

import jsonargparse

from trainer import cli
from trainer.config import ActivationsConfig, TrainingConfig
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
    """The command line. Returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv).as_dict()

    def run() -> None:
        activations = _build(ActivationsConfig, options)
        sweep = _build(SweepConfig, options)
        training = _build(TrainingConfig, options)
        saes = sweep.expand({field.name: options.get(field.name) for field in dataclasses.fields(SAEConfig)})
        # torch and transformer_lens take seconds to import: a wrong option should not wait for them.
        from trainer.train import train

        train(activations, saes, training)

    return cli.status(run, "Stopped. Activations harvested and steps saved so far are kept.")


def _build(group: type, options: dict[str, Any]) -> Any:
    return group(**{field.name: options[field.name] for field in dataclasses.fields(group)})


if __name__ == "__main__":
    sys.exit(main())
