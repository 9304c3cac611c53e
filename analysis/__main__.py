"""The command line: `python -m analysis checkpoints/<name> ...`."""

import sys
from dataclasses import fields

import jsonargparse

from analysis.corpus.run import AnalysisConfig, analyse
from trainer import cli
from trainer.sharing.pull import located


def build_parser() -> jsonargparse.ArgumentParser:
    """One flag per field of `AnalysisConfig`, with its docstring as help, and how to run."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m analysis",
        description="Write what every feature and every head of checkpoints does to <checkpoint>/analysis/. "
        "Checkpoints of one model that are named together share its work.",
    )
    parser.add_argument("checkpoints", nargs="+", help=f"{cli.CHECKPOINT[0].upper()}{cli.CHECKPOINT[1:]}.")
    parser.add_class_arguments(AnalysisConfig, skip={"summary"})
    light = "Keep what the Model page and circuits need, in a twentieth of the room: roles, densities, descriptions, "
    light += "logits promoted and the strongest example of each feature. No search by token, histograms or redundancy."
    parser.add_argument("--summary", action="store_true", help=light)
    parser.add_argument("--resume", action="store_true", help="Go on with an interrupted analysis.")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto.")
    parser.add_argument("--wandb", choices=["online", "offline", "disabled"], default="disabled")
    cli.add_places(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = build_parser().parse_args(argv)

    def run() -> None:
        cfg = AnalysisConfig(**{option.name: options[option.name] for option in fields(AnalysisConfig)})
        paths = [located(path) for path in options.checkpoints]
        analyse(paths, cfg, options.resume, options.device, options.wandb, options.model, options.text)

    return cli.status(run, "Stopped.", many_processes=True)


if __name__ == "__main__":
    sys.exit(main())
