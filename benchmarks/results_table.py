"""The tables of docs/results.md, from eval.json of every checkpoint.

    python -m benchmarks.results_table [FOLDER ...] [--names GLOB ...] [--heads 3 4 5] [--frontier GLOB]

It reads JSON and nothing else, so that a reader can check every figure against its file.
"""

import argparse
import json
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results_table", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("checkpoints")], help="of checkpoints, in which")
    parser.add_argument("--names", nargs="+", default=["*"], help="those that match one, as '*-L17-*' (all)")
    parser.add_argument(
        "--heads", nargs="*", type=int, default=[3, 4, 5], help="printed one by one (3 4 5); none: no such columns"
    )
    parser.add_argument("--frontier", help="those among which the L0 for each other one's figures is looked up")
    options = parser.parse_args()
    files = {
        file.parent.name: file
        for folder in options.folders
        for names in options.names
        for file in folder.glob(f"{names}/eval.json")
    }
    rows = {name: json.loads(files[name].read_text()) for name in sorted(files, key=numbered)}
    folders = ", ".join(map(str, options.folders))
    if not rows:
        parser.error(f"{folders}: no eval.json of {' or '.join(options.names)}")
    parts = zip(*(name.split("-") for name in rows), strict=False)
    shared = "-".join(same[0] for same in takewhile(lambda part: len(set(part)) == 1, parts))  # model and layer
    print(f"Checkpoints of {folders}: `{shared}-...`; n/m: not measurable on this text.\n")
    print("\n".join([*on_text(rows, shared, options.heads), "", *on_repeats(rows, shared, options.heads)]))
    if options.frontier:
        frontier = {name for name in rows if fnmatch(name, options.frontier)}
        if not frontier:
            parser.error(f"none of them is {options.frontier}")
        print("\n".join(["", *at_equal_figures(rows, shared, frontier)]))


def on_text(rows: dict[str, Figures], shared: str, heads: list[int]) -> list[str]:
    """L0, FVU and KL score on held-out text; a CE score is only there where it is measurable."""
    found = [
        [
            name.removeprefix(f"{shared}-"),
            score(f, "L0", 1),
            score(f, "FVU"),
            score(f, "KL_score"),
            score(f, "CE_score"),
            score(f, "norm_ratio"),
            "{:.3f} ({})".format(*max((fvu, head) for head, fvu in enumerate(f["FVU_per_head"]) if fvu is not None)),
            *([", ".join(number(f["FVU_per_head"][head], 2) for head in heads)] if heads else []),
            f"{f['silent_fraction']:.1%}",
        ]
        for name, f in rows.items()
    ]
    tokens = counts(rows.values())
    columns = [
        "SAE",
        "L0",
        "FVU",
        "KL score",
        "CE score",
        "norm ratio",
        "worst head's FVU (head)",
        *([f"FVU of heads {said(heads)}"] if heads else []),
    ]
    return [f"Held-out text, {tokens} tokens:", "", *table([*columns, f"silent on {tokens} tokens"], found)]


def on_repeats(rows: dict[str, Figures], shared: str, heads: list[int]) -> list[str]:
    """The same on repeated random tokens, where L0 is another one."""
    repeated = {name: f["induction"] for name, f in rows.items()}
    alone = ("CE", "KL") if heads else ()
    found = [
        [
            name.removeprefix(f"{shared}-"),
            score(f, "L0", 1),
            score(f, "CE_score"),
            score(f, "KL_score"),
            *(", ".join(number(f[f"{of}_score_per_head"][head]) for head in heads) for of in alone),
        ]
        for name, f in repeated.items()
    ]
    columns = ["SAE", "L0 there", "CE score", "KL score"]
    columns += [f"{of} score of heads {said(heads)}, each replaced alone" for of in alone]
    return [f"Repeated random tokens, {counts(repeated.values())} scored:", "", *table(columns, found)]


def at_equal_figures(rows: dict[str, Figures], shared: str, frontier: set[str]) -> list[str]:
    """The L0 at which the frontier has another SAE's FVU and KL score, and what share of the other's L0 that is."""
    found = [
        [name.removeprefix(f"{shared}-"), f"{f['L0']:.0f}"]
        + [needed([rows[each] for each in frontier], f, metric) for metric in ("KL_score", "FVU")]
        for name, f in rows.items()
        if name not in frontier
    ]
    names = said(sorted(each.removeprefix(f"{shared}-") for each in frontier))
    columns = ["SAE", "L0", "at equal KL score", "at equal FVU"]
    return [f"L0 that {names} need for it, between them on a log scale of L0:", "", *table(columns, found)]


def needed(frontier: list[Figures], figures: Figures, metric: str) -> str:
    """L0 at equal value of a metric."""
    value = figures[metric]
    points = sorted((each[metric], each["L0"]) for each in frontier if each[metric] is not None)
    if value is None or not points:
        return "n/m"
    values, l0 = zip(*points, strict=True)
    if not values[0] <= value <= values[-1]:
        worst = values[0] if metric == "KL_score" else values[-1]
        better = worst > value if metric == "KL_score" else worst < value
        return f"better already at L0 {min(l0):.0f}" if better else "beyond it"
    at = float(np.exp(np.interp(value, values, np.log(l0))))
    share = figures["L0"] / at
    return f"{at:.0f}, 1/{share:.1f}" if share >= 1 else f"{at:.0f}, {1 / share:.1f} times"


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def score(figures: Figures, key: str, digits: int = 3) -> str:
    """A figure with its standard error, clustered by context."""
    error = "" if figures[key] is None else f" ± {number(figures[f'{key}_se'], digits)}"
    return number(figures[key], digits) + error


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or that it has none: its denominator is not 3 standard errors above 0, or the head is constant."""
    return "n/m" if value is None else f"{value:.{digits}f}"


def counts(rows: Any) -> str:
    """How many tokens were scored: one number where all SAEs saw as many."""
    return " or ".join(f"{n:,}" for n in sorted({f["n_tokens"] for f in rows}))


def numbered(name: str) -> list[str | int]:
    """What layer 9 goes before layer 10 by."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def said(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))


if __name__ == "__main__":
    main()
