"""How much of a target some features make by themselves: they are kept, and all others stand at something else.

After the faithfulness of Marks et al. 2024 (arXiv:2403.19647): (y(kept) - y(none)) / (y(all) - y(none)), where `none`
has every feature at its mean over a text, or at what it is on another text, and `all` is the model as it is. Every
layer's SAE takes part at once, and features that are kept are computed anew from what is left. What the SAEs do not
explain (errors) stays, or goes too.
"""

from bisect import bisect
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.prompt.circuit.others import Others
from analysis.prompt.circuit.target import Number
from trainer.block_diag import BlockDiagSAE

COUNTS = (0, 1, 3, 10, 30, 100, 300, 1000)  # features kept, and all that fire
_TOKENS = 2048  # of one forward


@torch.no_grad()
def kept(
    number: Number,
    sets: Sequence[pd.DataFrame | None],
    others: Others,
    errors: bool = True,
) -> Float[Tensor, " set"]:
    """The target with only some features as they are.

    Args:
        sets: nodes with layer, feature and position: these are kept; None keeps all.
        others: what all that are not kept stand at.
        errors: whether what SAEs do not explain stays as it is in the run, or goes.
    """
    nodes = number.nodes
    lm, frozen = nodes.frozen.lm, nodes.frozen
    size, values = max(1, _TOKENS // len(frozen.tokens)), []
    for start in range(0, len(sets), size):
        some = sets[start : start + size]
        edits = []
        for layer in range(number.n_layers):
            if (sae := nodes.saes.get(layer)) is not None:
                keep = torch.stack([_mask(each, layer, sae, len(frozen.tokens)) for each in some])
                edits.append((lm.layer(layer).hook_name, _Replaced(sae, keep.to(lm.device), others[layer], errors)))
        inputs = frozen.tokens[None].expand(len(some), -1)
        got = lm.capture(inputs, [number.hook], edits=edits)[number.hook]
        values.append(number.of(got).cpu())
    return torch.cat(values)


def curve(
    number: Number,
    order: pd.DataFrame,
    counts: Sequence[int],
    others: Sequence[Others],
    densities: Mapping[int, np.ndarray],
    errors: bool = True,
    draws: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Faithfulness against the number of features kept: kept, value, faithfulness, random, random_se.

    Args:
        order: features in the order in which they are kept: layer, feature, position.
        others: what those that are not kept stand at; of several the target is the mean over them.
        densities: of the features of each layer; as many random ones of the same layer, position and nearly the same
            density are kept instead, `draws` times: `random` is their mean.
    """
    sets = [order.head(n) for n in counts]
    generator = np.random.default_rng(seed)
    drawn = [random_like(each, densities, generator) for each in sets for _ in range(draws)]
    runs = [kept(number, [order.head(0), *sets, *drawn], each, errors) for each in others]
    values = torch.stack(runs).double().mean(0)
    whole, none = number.value(), float(values[0])
    share = ((values - none) / (whole - none)).numpy()
    random = share[1 + len(sets) :].reshape(len(sets), draws)
    return pd.DataFrame(
        {
            "kept": list(counts),
            "value": values[1 : 1 + len(sets)].numpy(),
            "faithfulness": share[1 : 1 + len(sets)],
            "random": random.mean(1),
            "random_se": random.std(1, ddof=1) / draws**0.5 if draws > 1 else np.nan,
        }
    )


def ranked(attribution: pd.DataFrame) -> tuple[pd.DataFrame, list[int]]:
    """Features of `Number.attribution` but those at BOS, the strongest first, and how many of them a curve keeps."""
    features = attribution[(attribution["kind"] == "feature") & (attribution["position"] > 0)]
    order = features.loc[features["attribution"].abs().sort_values(ascending=False).index]
    return order, [*(n for n in COUNTS if n < len(order)), len(order)]


def random_like(
    chosen: pd.DataFrame, densities: Mapping[int, np.ndarray], generator: np.random.Generator, near: int = 20
) -> pd.DataFrame:
    """As many other features of the same layers and positions, each once, and among the `near` closest to one in
    density that are left; where none is left, the feature itself."""
    features = chosen["feature"].to_numpy(dtype=int, copy=True)
    ascending = {layer: np.argsort(density, kind="stable") for layer, density in densities.items()}
    for (layer, _), rows in chosen.groupby(["layer", "position"]).indices.items():
        density, here, order = densities[layer], features[rows], ascending[layer]
        left = order[~np.isin(order, here)].tolist()
        known = density[left].tolist()
        for row, wanted in zip(rows, density[here].tolist(), strict=True):
            at = bisect(known, wanted)
            around = range(max(0, at - near), min(at + near, len(known)))
            nearest = sorted(around, key=lambda i: abs(known[i] - wanted))[:near]
            if nearest:
                drawn = nearest[generator.integers(len(nearest))]
                features[row] = left.pop(drawn)
                known.pop(drawn)
    return chosen.assign(feature=features)


class _Replaced:
    """z with features that are not kept at something else."""

    def __init__(self, sae: BlockDiagSAE, keep: Tensor, others: Tensor, errors: bool) -> None:
        self._sae, self._keep, self._others, self._errors = sae, keep, others, errors

    def __call__(self, z: Float[Tensor, "set pos head d_head"], rows: slice) -> Tensor:
        x = z.to(self._sae.W_dec.dtype)
        f = self._sae.encode(x)
        keep = self._keep[rows]
        if self._errors:
            change = self._sae.decode(torch.where(keep, 0, self._others - f)) - self._sae.b_dec
            new = x + change.view_as(x)
        else:
            new = self._sae.decode(torch.where(keep, f, self._others)).view_as(x)
        new[:, 0] = x[:, 0]  # BOS is left alone
        return new.to(z.dtype)


def _mask(chosen: pd.DataFrame | None, layer: int, sae: BlockDiagSAE, length: int) -> Tensor:
    """Which features are kept [pos, block, feature]."""
    mask = torch.full((length, sae.d_sae), chosen is None)
    if chosen is not None:
        here = chosen[chosen["layer"] == layer]
        mask[here["position"].to_numpy(dtype=int), here["feature"].to_numpy(dtype=int)] = True
    return mask.view(length, sae.n_blocks, -1)
