"""The quality table from eval.json of checkpoints, what L0 a recipe needs for the figures of another, and L0 after
merging redundant features, where there is an analysis.

python -m benchmarks.quality checkpoints
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from analysis.runs.tables import with_error
from analysis.store import Analysis
from trainer.checkpoint import Checkpoint, list_checkpoints


def main(folder: Path) -> None:
    rows = [each for each in list_checkpoints(folder).readable if each.eval and each.config.options]
    rows.sort(key=lambda each: (each.config.options.sae.preset or each.config.options.sae.recipe, each.name))
    columns = "L0 | FVU | KL score | CE score, repeated tokens | silent | worst head's FVU"
    print(f"| checkpoint | {columns} | FVU of heads 3, 4, 5 |\n|{'---|' * 8}")
    for each in rows:
        name, f = each.name, each.eval
        worst = int(np.nanargmax(per_head(f)))
        kl, ce = with_error(f, "KL_score"), with_error(f["induction"], "CE_score")
        induction = ", ".join(f"{per_head(f)[head]:.2f}" for head in (3, 4, 5))
        print(
            f"| {name} | {f['L0']:.1f} | {f['FVU']:.3f} | {kl} | {ce} "
            f"| {f['silent_fraction']:.1%} | {per_head(f)[worst]:.3f} (head {worst}) | {induction} |"
        )
    print()
    plain = [each for each in rows if not each.is_dense and not each.config.options.sae.label]
    frontier = [each.eval for each in plain if each.config.options.sae.recipe == "batchtopk"]
    for each in rows:
        if each.config.options.sae.recipe == "april":
            for metric in ("FVU", "KL_score"):
                print(f"{each.name}: {needed(frontier, each.eval, metric)}")
    merging(rows)


def merging(checkpoints: list[Checkpoint]) -> None:
    """L0 where features of different heads that say the same count once."""
    columns = "tokens | L0 | both >= 0.5 | both >= 0.3 | Jaccard >= 0.5 (largest cluster)"
    print(f"\n| checkpoint | {columns} |\n|{'---|' * 6}")
    for checkpoint in checkpoints:
        if not (checkpoint.path / "analysis" / "meta.json").exists():
            continue
        analysis = Analysis(checkpoint)
        found = analysis.meta["redundancy"]
        at = analysis.merging.set_index(["criterion", "threshold"])
        both = [at.loc[("both", threshold), "L0"] for threshold in (0.5, 0.3)]
        alone = at.loc[("jaccard", 0.5)]
        print(
            f"| {checkpoint.name} | {found['n_tokens']:,} | {found['l0']:.1f} | {both[0]:.1f} | {both[1]:.1f} "
            f"| {alone['L0']:.1f} ({alone['largest']:.0f}) |"
        )


def per_head(figures: dict[str, Any]) -> Any:
    """FVU of each head; NaN of one that is constant, which has none."""
    return np.array(figures["FVU_per_head"], dtype=float)


def needed(frontier: list[dict[str, Any]], figures: dict[str, Any], metric: str) -> str:
    """The L0 at which batchtopk has the same figure, between its points on a log scale of L0."""
    points = sorted((each[metric], each["L0"]) for each in frontier)
    values = [value for value, _ in points]
    if not values or not values[0] <= figures[metric] <= values[-1]:
        return f"{metric} {figures[metric]:.3f} at L0 {figures['L0']:.0f} lies beyond the batchtopk points"
    l0 = float(np.exp(np.interp(figures[metric], values, np.log([l0 for _, l0 in points]))))
    return (
        f"{metric} {figures[metric]:.3f} at L0 {figures['L0']:.0f}; batchtopk needs L0 {l0:.0f}, "
        f"1/{figures['L0'] / l0:.1f} of it"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "checkpoints"))
