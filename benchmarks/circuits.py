"""What attribution over all layers is worth on a set of SAEs: the tables of "Circuits" in docs/results.md.

    python -m benchmarks.circuits checkpoints/smollm2-135m-L*-batchtopk-x4-k32 [--prompts=50] [--out=circuits.json]

On prompts of two kinds, made from templates: indirect objects ("When John and Mary went to the store, John gave a drink
to": ' Mary' rather than ' John') and induction (random words, repeated up to one that came before: what followed it
rather than a word that followed another one). Per kind: correlation of attribution with what removing does, for whole
heads and for the strongest features; the faithfulness curve, beside random features, whole heads, with what SAEs leave
out gone, and with the others at what they are on other text instead of at their mean. Errors are over prompts. Each
prompt is saved when it is done: the same command goes on.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from analysis.prompt.circuit.faithful import COUNTS, curve, kept, ranked
from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.circuit.others import at_mean, resampled
from analysis.prompt.circuit.target import Number, Target
from analysis.store import Analysis
from trainer.checkpoint import Checkpoint
from trainer.clustered import ratio
from trainer.files import write_json
from trainer.model.frozen import Frozen

HEADS = (0, 1, 3, 10, 30, 100)
_FEATURES = 20  # of a prompt, that are removed one by one
_CONTEXTS = 2  # of other text, on which features are what those stand at that are not kept
_CURVES = {  # by the name of the target with nothing kept
    "strongest": "none",
    "random": "none",
    "without errors": "none without errors",
    "resampled": "none resampled",
    "random resampled": "none resampled",
}
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
    densities, mean = statistics["densities"], [at_mean(nodes, statistics["features"])]
    elsewhere = resampled(nodes, statistics["contexts"])
    # Two runs with random features of each curve, however many things the others stand at.
    stays, bare, other = (
        curve(number, features, counts, stand, densities, errors, draws=2 // len(stand))
        for stand, errors in ((mean, True), (mean, False), (elsewhere, True))
    )
    whole, none = number.value(), float(stays["value"].iloc[0])
    order = heads.loc[heads["attribution"].abs().sort_values(ascending=False).index]
    of_heads = kept(number, [features_of(order.head(n), nodes) for n in HEADS], mean[0]).double()
    rest = table[(table["position"] > 0)].groupby("kind")["attribution"].agg(lambda values: float(values.abs().sum()))
    return {
        "target": whole,
        "firing": len(features),
        "heads": {name: heads[name].tolist() for name in ("layer", "head", "attribution", "effect")},
        "features": {name: strongest[name].tolist() for name in ("layer", "attribution", "effect", "direct")},
        "attribution": rest.to_dict(),
        "none": none,
        "kept": counts,
        "strongest": (stays["value"] - none).tolist(),
        "random": (stays["random"] * (whole - none)).tolist(),
        "whole heads": (of_heads - none).tolist(),
        "without errors": (bare["value"] - bare["value"].iloc[0]).tolist(),
        "none without errors": float(bare["value"].iloc[0]),
        "resampled": (other["value"] - other["value"].iloc[0]).tolist(),
        "random resampled": (other["random"] * (whole - other["value"].iloc[0])).tolist(),
        "none resampled": float(other["value"].iloc[0]),
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
        "features": tables,
        "densities": {layer: table["density"].to_numpy() for layer, table in tables.items()},
        "contexts": Analysis(checkpoints[min(checkpoints)]).some_contexts(_CONTEXTS),
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
    of_errors = [each["attribution"].get("error", 0.0) / sum(each["attribution"].values()) for each in found]
    print(f"Share of |attribution| that errors have: {said(of_errors)}")
    columns = [
        "features kept",
        "faithfulness",
        "random",
        "without what SAEs leave out",
        "resampled",
        "random, resampled",
    ]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for place, n in enumerate([*COUNTS, "all that fire"]):
        rows = [each for each in found if isinstance(n, str) or n in each["kept"][:-1]]
        at = -1 if isinstance(n, str) else place
        shares = [share(rows, name, at) for name in _CURVES]
        print(f"| {n} | {' | '.join(shares)} |")
    print(f"\nFeatures that fire: {said([float(each['firing']) for each in found], 0)}")
    heads_kept = [f"{n} {share(found, 'whole heads', place)}" for place, n in enumerate(HEADS)]
    print(f"Whole heads kept: {'; '.join(heads_kept)}")


def share(found: list[dict[str, Any]], name: str, place: int) -> str:
    """What is gained over keeping nothing, as a share of what there is to gain, over all prompts together.

    A ratio of sums, because some prompts have next to nothing to gain; its error is over prompts.
    """
    none = _CURVES.get(name, "none")
    gained = torch.tensor([each[name][place] for each in found])
    whole = torch.tensor([each["target"] - each[none] for each in found])
    return "{:.2f} ± {:.2f}".format(*(each.item() for each in ratio(gained, whole)))


def correlation(columns: dict[str, list[float]], first: int = 0) -> float:
    """Of attribution and effect, from a layer on."""
    table = pd.DataFrame(columns)
    table = table[table["layer"] >= first]
    return float(np.corrcoef(table["attribution"], table["effect"])[0, 1])


def said(values: list[float], digits: int = 2) -> str:
    """Mean ± its standard error over prompts."""
    known = np.array(values, dtype=float)
    return f"{known.mean():.{digits}f} ± {known.std(ddof=1) / len(known) ** 0.5:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
