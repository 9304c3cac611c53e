"""The tables of docs/results.md, from eval.json of every checkpoint.

    python -m benchmarks.results_table [FOLDER ...] [--names GLOB] [--heads 3 4 5]

It reads JSON and nothing else, so that a reader can check every figure against its file.
"""

import argparse
import json
from itertools import takewhile
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results_table", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("checkpoints")], help="of checkpoints, in which")
    parser.add_argument("--names", default="*", help="those that match, as '*-L17-*' (all)")
    parser.add_argument("--heads", nargs="+", type=int, default=[3, 4, 5], help="printed one by one (3 4 5)")
    options = parser.parse_args()
    files = [file for folder in options.folders for file in folder.glob(f"{options.names}/eval.json")]
    rows = {file.parent.name: json.loads(file.read_text()) for file in sorted(files, key=lambda file: file.parent.name)}
    folders = ", ".join(map(str, options.folders))
    if not rows:
        parser.error(f"{folders}: no {options.names}/eval.json")
    parts = zip(*(name.split("-") for name in rows), strict=False)
    shared = "-".join(same[0] for same in takewhile(lambda part: len(set(part)) == 1, parts))  # model and layer
    print(f"Checkpoints of {folders}: `{shared}-...`; n/m: not measurable on this text.\n")
    print("\n".join([*on_text(rows, shared, options.heads), "", *on_repeats(rows, shared, options.heads)]))


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
            ", ".join(number(f["FVU_per_head"][head], 2) for head in heads),
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
        f"FVU of heads {said(heads)}",
    ]
    return [f"Held-out text, {tokens} tokens:", "", *table([*columns, f"silent on {tokens} tokens"], found)]


def on_repeats(rows: dict[str, Figures], shared: str, heads: list[int]) -> list[str]:
    """The same on repeated random tokens, where L0 is another one."""
    repeated = {name: f["induction"] for name, f in rows.items()}
    found = [
        [
            name.removeprefix(f"{shared}-"),
            score(f, "L0", 1),
            score(f, "CE_score"),
            score(f, "KL_score"),
            ", ".join(number(f["CE_score_per_head"][head]) for head in heads),
            ", ".join(number(f["KL_score_per_head"][head]) for head in heads),
        ]
        for name, f in repeated.items()
    ]
    alone = f"of heads {said(heads)}, each replaced alone"
    columns = ["SAE", "L0 there", "CE score", "KL score", f"CE score {alone}", f"KL score {alone}"]
    return [f"Repeated random tokens, {counts(repeated.values())} scored:", "", *table(columns, found)]


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


def said(heads: list[int]) -> str:
    return ", ".join(map(str, heads))


if __name__ == "__main__":
    main()
