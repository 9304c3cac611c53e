"""What attribution over all layers is worth on a set of SAEs: the tables of "Circuits" in docs/results.md.

    python -m benchmarks.circuits checkpoints/smollm2-135m-L*-batchtopk-x4-k32 [--prompts=50] [--out=circuits.json]

On prompts of two kinds, made from templates: indirect objects ("When John and Mary went to the store, John gave a drink
to": ' Mary' rather than ' John') and induction (random words, repeated up to one that came before: what followed it
rather than a word that followed another one). Per kind: correlation of attribution with what removing does, for whole
heads and for the strongest features; the faithfulness curve, beside random features, whole heads, and with what SAEs
leave out gone; features needed for 80 % of the target. Errors are over prompts. Each prompt is saved
when it is done: the same command goes on.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from analysis.prompt.circuit.faithful import COUNTS, curve, kept, ranked
from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.circuit.target import Number, Target
from analysis.store import Analysis
from trainer.checkpoint import Checkpoint
from trainer.files import write_json
from trainer.model.frozen import Frozen

HEADS = (0, 1, 3, 10, 30, 100)
_FEATURES = 20  # of a prompt, that are removed one by one
_NAMES = ["John", "Mary", "Tom", "James", "Sarah", "Anna", "Paul", "Peter", "Mark", "Alice"]
_PLACES = ["store", "park", "school", "office", "station"]
_THINGS = ["drink", "book", "letter", "ring", "ball"]
_WORDS = [
    *("cat", "dog", "house", "tree", "river", "road", "king", "ship", "stone", "bird", "fire", "gold", "horse", "door"),
    *("field", "wind", "night", "book", "table", "garden", "city", "train", "paper", "water", "moon", "glass"),
]


def prompts(kind: str, n: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Prompt, the next token that is right, and the one that it is compared with; each once."""
    generator, found = np.random.default_rng(seed), {}
    while len(found) < n:
        if kind == "IOI":
            a, b = generator.choice(_NAMES, 2, replace=False)
            place, thing = generator.choice(_PLACES), generator.choice(_THINGS)
            text = f"When {a} and {b} went to the {place}, {a} gave a {thing} to"
            found[text] = (text, f" {b}", f" {a}")
        else:
            words = generator.choice(_WORDS, 10, replace=False)
            again = int(generator.integers(1, 6))
            text = " ".join([*words, *words[: again + 1]]).capitalize()
            found[text] = (text, f" {words[again + 1]}", f" {words[again + 3]}")
    return list(found.values())


def of_prompt(lm: Any, saes: dict[int, Any], statistics: dict[str, Any], text: str, right: str, wrong: str) -> dict:
    """Everything about one prompt."""
    nodes = Nodes(Frozen(lm, lm.to_tokens(text)[0]), saes)
    last = len(nodes.frozen.tokens) - 1
    number = Number(nodes, Target(last, lm.single_token(right), lm.single_token(wrong)))
    heads = number.heads()
    table = number.attribution()
    features, counts = ranked(table)
    strongest = number.removed(features.head(_FEATURES))
    means, densities = statistics["means"], statistics["densities"]
    stays, bare = (curve(number, features, counts, means, densities, errors, draws=2) for errors in (True, False))
    order = heads.loc[heads["attribution"].abs().sort_values(ascending=False).index]
    of_heads = kept(number, [features_of(order.head(n), nodes) for n in HEADS], means).double()
    of_heads = (of_heads - of_heads[0]) / (number.value() - of_heads[0])
    rest = table[(table["position"] > 0)].groupby("kind")["attribution"].agg(lambda values: float(values.abs().sum()))
    return {
        "target": number.value(),
        "firing": len(features),
        "heads": {name: heads[name].tolist() for name in ("layer", "head", "attribution", "effect")},
        "features": {name: strongest[name].tolist() for name in ("layer", "attribution", "effect", "direct")},
        "attribution": rest.to_dict(),
        "curve": stays.to_dict("list"),
        "whole heads": of_heads.tolist(),
        "without errors": bare["faithfulness"].tolist(),
    }


def features_of(heads: pd.DataFrame, nodes: Nodes) -> pd.DataFrame:
    """Every feature of some heads at every position but BOS: layer, position, feature."""
    at, names = range(1, len(nodes.frozen.tokens)), ["layer", "position", "feature"]
    parts = [pd.DataFrame(columns=names, dtype=int)]
    for layer, head in heads[["layer", "head"]].itertuples(index=False):
        size = nodes.saes[layer].features_per_block
        ids = range(head * size, (head + 1) * size)
        parts.append(pd.MultiIndex.from_product([[layer], at, ids], names=names).to_frame(index=False))
    return pd.concat(parts, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.circuits", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="of one SAE on several layers, each with an analysis")
    parser.add_argument("--prompts", type=int, default=50, help="of each kind")
    parser.add_argument("--out", type=Path, default=Path("circuits.json"), help="where what is done is kept")
    options = parser.parse_args()
    checkpoints = {each.layer: each for each in map(Checkpoint, options.checkpoints)}
    tables = {layer: Analysis(each).features for layer, each in checkpoints.items()}
    saes = {layer: each.sae for layer, each in checkpoints.items()}
    statistics = {
        "densities": {layer: table["density"].to_numpy() for layer, table in tables.items()},
        "means": {layer: (table["density"] * table["mean_activation"]).to_numpy() for layer, table in tables.items()},
    }
    lm = next(iter(checkpoints.values())).open_model("cpu")
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for kind in ("IOI", "induction"):
        for text, right, wrong in tqdm(prompts(kind, options.prompts), desc=kind, dynamic_ncols=True):
            if text not in done:
                done[text] = {"kind": kind, **of_prompt(lm, saes, statistics, text, right, wrong)}
                write_json(options.out, done)
    for kind in ("IOI", "induction"):
        report(kind, [each for each in done.values() if each["kind"] == kind])


def report(kind: str, found: list[dict[str, Any]]) -> None:
    """Print what the prompts of a kind say."""
    values = [each["target"] for each in found]
    print(
        f"\n{kind}, {len(found)} prompts: logit difference {said(values)}, right in {np.mean(np.array(values) > 0):.0%}"
    )
    heads = [correlation(each["heads"]) for each in found]
    late = [correlation(each["heads"], 8) for each in found]
    print(f"Correlation of attribution with zeroing, whole heads: {said(heads)}; from layer 8 on {said(late)}")
    print(f"The same for the {_FEATURES} strongest features: {said([correlation(each['features']) for each in found])}")
    share = [each["attribution"].get("error", 0.0) / sum(each["attribution"].values()) for each in found]
    print(f"Share of |attribution| that errors have: {said(share)}")
    print("\n| features kept | faithfulness | random ones | without what SAEs leave out |\n|---|---|---|---|")
    for place, n in enumerate(COUNTS):
        rows = [each for each in found if len(each["curve"]["kept"]) > place and each["curve"]["kept"][place] == n]
        if rows:
            columns = [[each["curve"][name][place] for each in rows] for name in ("faithfulness", "random")]
            columns.append([each["without errors"][place] for each in rows])
            print(f"| {n} | {' | '.join(map(said, columns))} |")
    whole = [[each["curve"][name][-1] for each in found] for name in ("faithfulness", "random")]
    whole.append([each["without errors"][-1] for each in found])
    print(f"| all that fire ({said([float(each['firing']) for each in found], 0)}) | {' | '.join(map(said, whole))} |")
    rows = [f"{n} {said([each['whole heads'][place] for each in found])}" for place, n in enumerate(HEADS)]
    print(f"\nWhole heads kept, with all their features: {'; '.join(rows)}")
    needed = [first_at(each["curve"], 0.8) for each in found]
    reached = [n for n in needed if n is not None]
    median = f": median {np.median(reached):.0f}" if reached else ""
    print(f"\nFeatures for 80 % of the target: {len(reached)} of {len(found)} prompts reach it{median}")


def correlation(columns: dict[str, list[float]], first: int = 0) -> float:
    """Of attribution and effect, from a layer on."""
    table = pd.DataFrame(columns)
    table = table[table["layer"] >= first]
    return float(np.corrcoef(table["attribution"], table["effect"])[0, 1])


def first_at(columns: dict[str, list[float]], share: float) -> int | None:
    """The smallest number kept from which on the share is reached."""
    reached = [n for n, value in zip(columns["kept"], columns["faithfulness"], strict=True) if value >= share]
    return reached[0] if reached else None


def said(values: list[float], digits: int = 2) -> str:
    """Mean ± its standard error over prompts."""
    known = np.array(values, dtype=float)
    return f"{known.mean():.{digits}f} ± {known.std(ddof=1) / len(known) ** 0.5:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
