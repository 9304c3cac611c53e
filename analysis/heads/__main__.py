"""The command line: `python -m analysis.heads MODEL`."""

import sys
from dataclasses import fields

import jsonargparse

from analysis.heads.run import HeadsConfig, describe_heads, summary
from analysis.heads.table import ModelHeads
from trainer import cli


def build_parser() -> jsonargparse.ArgumentParser:
    """One flag per field of `HeadsConfig`, with its docstring as help, and where to."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m analysis.heads",
        description="Write what every attention head of a model does, without any SAE, to <out>/<model>.heads/: where "
        "it looks on text and on repeated random tokens, whether it copies, and what removing it costs.",
    )
    parser.add_argument("model", help="TransformerLens model name, local Hugging Face folder, or smollm2-135m.")
    parser.add_class_arguments(HeadsConfig)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto.")
    parser.add_argument("--out", default="checkpoints", help="Folder in which the model gets its own.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = build_parser().parse_args(argv)

    def run() -> None:
        cfg = HeadsConfig(**{option.name: options[option.name] for option in fields(HeadsConfig)})
        print(summary(ModelHeads(describe_heads(options.model, cfg, options.device, options.out))))

    return cli.status(run)


if __name__ == "__main__":
    sys.exit(main())
