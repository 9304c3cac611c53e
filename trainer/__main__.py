"""The command line: `python -m trainer --help`."""

import sys

from trainer import cli


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""

    def run() -> None:
        decided = cli.build(cli.parser().parse_args(argv).as_dict())  # a file that it names may be anything
        # transformer_lens takes seconds to import: a wrong option should not wait for it.
        from trainer.train import train

        train(*decided)

    return cli.status(run, "Stopped. Activations harvested and steps saved so far are kept.", many_processes=True)


if __name__ == "__main__":
    sys.exit(main())
