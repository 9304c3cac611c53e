"""Checkpoints to and from the Hugging Face hub.

    python -m trainer.hub push checkpoints/<name> ... OWNER/REPO [--private] [--with_analysis]
    python -m trainer.hub pull OWNER/REPO[/NAME] [--out checkpoints] [--revision REVISION]

Every command that takes a checkpoint directory takes hf://OWNER/REPO/NAME[@REVISION], too.
"""

import argparse
import sys
from pathlib import Path

from trainer import cli
from trainer.config import require
from trainer.sharing.pull import OUT, located, pull


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.hub", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    each = commands.add_parser("push", help="put checkpoints into a repository, each into a folder of its name")
    each.set_defaults(run=_push)
    each.add_argument("checkpoints", nargs="+", help="checkpoint directories")
    each.add_argument("repo", metavar="OWNER/REPO", help="repository; made if need be")
    each.add_argument("--private", action="store_true", help="where it is made, only its owner sees it")
    each.add_argument(
        "--with_analysis", action="store_true", help="push analysis/ too: it quotes the text that was analysed"
    )
    each.add_argument("--message", help="of the commit")
    each.add_argument("--license", help="for the card, as mit or apache-2.0; default that of the card there")
    each.add_argument("--replace", action="store_true", help="take the place of what has the same name there")
    each = commands.add_parser("pull", help="make checkpoints of those in a repository")
    each.set_defaults(run=_pull)
    each.add_argument("source", metavar="OWNER/REPO[/NAME]", help="all checkpoints of a repository, or one of them")
    each.add_argument("--out", type=Path, default=OUT, help="folder of checkpoints; default %(default)s")
    each.add_argument("--revision", help="branch, tag or commit; default the newest")
    options = parser.parse_args(argv)
    return cli.status(lambda: options.run(options))


def _push(options: argparse.Namespace) -> None:
    from trainer.sharing.push import push

    paths = [located(path) for path in options.checkpoints]
    more = (options.private, options.with_analysis, options.message, options.license, options.replace)
    print(push(paths, options.repo, *more))


def _pull(options: argparse.Namespace) -> None:
    parts = options.source.removeprefix("hf://").split("/")
    require(len(parts) in (2, 3) and all(parts), f"{options.source} is no OWNER/REPO or OWNER/REPO/NAME")
    name = parts[2] if len(parts) == 3 else None
    print(*pull("/".join(parts[:2]), name, options.out, options.revision), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
