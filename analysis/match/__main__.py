"""The command line: `python -m analysis.match checkpoints/A checkpoints/B ...`."""

import argparse
import sys

from analysis.match.score import match
from trainer import cli
from trainer.sharing.pull import located


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.match",
        description="Match the features of a checkpoint with those of others of the same model and layer, for the "
        "Compare page. Written to <checkpoint>/matches/<other>/.",
    )
    parser.add_argument("first", help=f"{cli.CHECKPOINT}; its held-out text is used")
    parser.add_argument("others", nargs="+", help="the same, to match it with")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of text (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (%(default)s)")
    cli.add_places(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = build_parser().parse_args(argv)
    how = (options.tokens, options.device, options.model, options.text)

    def run() -> None:
        first, *others = (located(path) for path in (options.first, *options.others))
        print(*match(first, others, *how), sep="\n")

    return cli.status(run)


if __name__ == "__main__":
    sys.exit(main())
