"""What the pages tabulate, as CSV: `python -m analysis.export_csv checkpoints/<name> OUT`.

    checkpoint.csv  the row of the Tradeoffs page        evaluation.csv  a row per head, from eval.json
    features.csv, heads.csv, copying.csv, pairs.csv, merging.csv         from analysis/

Token ids become texts; lists are JSON arrays. A text that a spreadsheet would take for a formula has an apostrophe
before it.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.runs import tables
from analysis.spreadsheet import guarded
from analysis.store import Analysis
from trainer import cli
from trainer.checkpoint import Checkpoint
from trainer.files import make_writable, write_atomically
from trainer.sharing.pull import located


def write_csv(path: Path, out: Path) -> list[Path]:
    """Write the CSV files of one checkpoint into the folder `out`; returns them.

    Raises:
        ValueError: the checkpoint or its analysis cannot be read, or nothing can be written there.
        OSError: there is no room; the file is named.
    """
    frames: dict[str, pd.DataFrame] = {}
    checkpoint = Checkpoint(path)
    frames["checkpoint"] = tables.summary([checkpoint])
    if checkpoint.eval is not None:
        frames["evaluation"] = tables.per_head(checkpoint.eval, checkpoint.n_heads)
    artefacts = Analysis(checkpoint)
    for name in filter(artefacts.has, ("features", "heads", "copying", "pairs", "merging")):
        frames[name] = artefacts.table(name)
    texts = artefacts.strings
    for table in frames.values():
        for column in map(str, table):
            if not table[column].map(lambda cell: isinstance(cell, np.ndarray)).any():
                continue
            lists = table[column].map(lambda cell: cell.tolist())
            if column.endswith("_ids"):
                lists = lists.map(lambda ids: [texts[i] for i in ids if i >= 0])
            table[column] = lists.map(json.dumps)
    make_writable(out)
    for name, table in frames.items():
        write_atomically(out / f"{name}.csv", partial(guarded(table).to_csv, index=False))
    return [out / f"{name}.csv" for name in frames]


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.export_csv", description="Write a checkpoint's tables as CSV."
    )
    parser.add_argument("checkpoint", help=cli.CHECKPOINT)
    parser.add_argument("out", type=Path, help="folder for the files")
    options = parser.parse_args(argv)
    return cli.status(lambda: print(*write_csv(located(options.checkpoint), options.out), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
