"""The command line: `python -m analysis checkpoints/<name> ...`."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from analysis.corpus.run import AnalysisConfig, analyse
from trainer import cli


def build_parser() -> argparse.ArgumentParser:
    """The options; those of the same layer, model and text share every forward."""
    default = AnalysisConfig()
    parser = argparse.ArgumentParser(
        prog="python -m analysis",
        description="Write what every feature and every head of checkpoints does to <checkpoint>/analysis/. "
        "Checkpoints of one layer that are named together share the language model's work.",
    )
    parser.add_argument("checkpoints", nargs="+", type=Path, help="checkpoint directories")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="tokens of text (%(default)s)")
    parser.add_argument("--dataset", help="all of another text than the held-out documents of the one trained on")
    parser.add_argument("--examples", type=int, default=default.examples, help="top contexts a feature (%(default)s)")
    parser.add_argument(
        "--quantile_examples", type=int, default=default.quantile_examples, help="firings over quantiles (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of the repeated random tokens (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted analysis")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (%(default)s)")
    parser.add_argument("--wandb", choices=["online", "offline", "disabled"], default="disabled", help="(%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = build_parser().parse_args(argv)

    def run() -> None:
        cfg = AnalysisConfig(**{field.name: getattr(options, field.name) for field in fields(AnalysisConfig)})
        analyse(options.checkpoints, cfg, options.resume, options.device, options.wandb)

    return cli.status(run, "Stopped.")


if __name__ == "__main__":
    sys.exit(main())
