"""L0 where features of different heads that say the same count once: the redundancy table of docs/results.md.

    python -m benchmarks.redundancy CHECKPOINT ...

Each needs an analysis (`python -m analysis`); a summary does not have it.
"""

import argparse

from analysis.store import Analysis
from trainer.checkpoint import Checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.redundancy", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="with an analysis")
    columns = "tokens | L0 | both >= 0.5 | both >= 0.3 | Jaccard >= 0.5 (largest cluster)"
    print(f"| checkpoint | {columns} |\n|{'---|' * 6}")
    for checkpoint in map(Checkpoint, parser.parse_args().checkpoints):
        analysis = Analysis(checkpoint)
        found = analysis.meta["redundancy"]
        at = analysis.merging.set_index(["criterion", "threshold"])
        both = [at.loc[("both", threshold), "L0"] for threshold in (0.5, 0.3)]
        alone = at.loc[("jaccard", 0.5)]
        print(
            f"| {checkpoint.name} | {found['n_tokens']:,} | {found['l0']:.1f} | {both[0]:.1f} | {both[1]:.1f} "
            f"| {alone['L0']:.1f} ({alone['largest']:.0f}) |"
        )


if __name__ == "__main__":
    main()
