"""The command line: `python -m analysis.match checkpoints/A checkpoints/B ...`."""

import argparse
import sys
from pathlib import Path

from analysis.match.score import match
from trainer import cli


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.match",
        description="Match the features of a checkpoint with those of others of the same model and layer, for the "
        "Compare page. Written to <checkpoint>/matches/<other>/.",
    )
    parser.add_argument("first", type=Path, help="checkpoint directory; its held-out text is used")
    parser.add_argument("others", type=Path, nargs="+", help="checkpoint directories")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of text (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (%(default)s)")
    cli.add_places(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = build_parser().parse_args(argv)
    what = (options.first, options.others, options.tokens, options.device, options.model, options.text)
    return cli.status(lambda: print(*match(*what), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
