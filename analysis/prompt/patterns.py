"""Where heads read from, as a matrix of every destination and source."""

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.prompt.run import PromptRun, positive_dfa

ATTENTION, ACTIVE, FEATURE = KINDS = ("Attention", "DFA of the features that fire", "DFA of the feature")


def matrices(run: PromptRun, kind: str, feature: tuple[int, int] | None = None) -> Float[Tensor, "head query source"]:
    """What every destination takes from every source, per head.

    Attention: A[q, s]. DFA of the features that fire: the sum of their positive parts, as the roles count them. DFA of
    the feature: A[q, s] (v[s] - b_V) . w at every destination, whether it fires there or not; 0 for heads that it does
    not read.

    Args:
        feature: block, and index in it; for the last kind.

    Raises:
        ValueError: no feature is given where one is needed.
    """
    if kind == ATTENTION:
        return run.pattern
    if kind == ACTIVE:
        return positive_dfa(run)
    if feature is None:
        raise ValueError("choose a feature first")
    block, index = feature
    out = torch.zeros_like(run.pattern)
    for head in range(len(out)) if run.dense else [block]:
        out[head] = run.pattern[head] * run.reads(head, [index])[:, 0]
    return out
