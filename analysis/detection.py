"""How well an explanation tells where a feature fires, without asking what the explanation is.

Detection, as auto-interp scores it (EleutherAI's delphi, Paulo et al. 2024, arXiv:2410.13928): a score for every
example, high where the explanation says that the feature fires.
"""

from typing import NamedTuple

import numpy as np


class Detected(NamedTuple):
    """Figures of one feature's examples, with standard errors clustered by context."""

    accuracy: float
    """Balanced: mean of the shares of firing and of other examples that are told right; 0.5 is chance."""
    accuracy_se: float
    auroc: float
    """Share of pairs, one firing and one not, in which the firing one scores higher, ties half; 0.5 is chance."""
    auroc_se: float


def detected(fires: np.ndarray, score: np.ndarray, context: np.ndarray) -> Detected:
    """Balanced accuracy, predicting that it fires where the score is above 0.5, and AUROC.

    Errors are the jackknife's over contexts (Efron 1982), because examples of one context are not independent; nan
    where there is one context, or one without which no example of a kind is left.

    Args:
        fires: bool [example].
        score: [example].
        context: id [example].

    Raises:
        ValueError: all examples fire, or none.
    """
    if fires.all() or not fires.any():
        raise ValueError("a feature is scored on examples that fire and others")
    is_out = context == np.unique(context)[:, None]  # [context, example]
    left = np.vstack([np.ones(len(fires), bool), ~is_out])  # [all and each context left out, example]
    of_firing, of_others = left[:, fires].astype(float), left[:, ~fires].astype(float)
    yes, no = score[fires][:, None], score[~fires]
    higher = (yes > no) + 0.5 * (yes == no)  # [firing, other]
    n_firing, n_others = of_firing.sum(1), of_others.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = np.einsum("ri,ij,rj->r", of_firing, higher, of_others) / (n_firing * n_others)
        told = of_firing @ (score[fires] > 0.5) / n_firing, of_others @ (score[~fires] <= 0.5) / n_others
    accuracy = (told[0] + told[1]) / 2
    return Detected(float(accuracy[0]), _jackknife(accuracy[1:]), float(auroc[0]), _jackknife(auroc[1:]))


def _jackknife(left_out: np.ndarray) -> float:
    n = len(left_out)
    return float(np.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum())) if n > 1 else float("nan")
