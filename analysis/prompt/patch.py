"""Activation patching: run prompt A with head outputs, or contributions of features, as they are in prompt B.

Meng et al. 2022, arXiv:2202.05262; per head Wang et al. 2022, arXiv:2211.00593. Positions correspond by a shift.
"""

from dataclasses import dataclass, replace
from math import nan
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.prompt.effect import Effect, effect_of
from analysis.prompt.intervene import check_span, check_which, contribution
from analysis.prompt.run import PromptRun
from trainer.block_diag import BlockDiagSAE
from trainer.config import require

if TYPE_CHECKING:  # it imports transformer_lens, for which pages that run no prompt should not wait
    from trainer.model.lm import Layer

Kind = Literal["z of head", "z of layer", "feature", "features of head"]

_NO_DIFFERENCE = 1e-4  # of logits: a share of less is a share of rounding


@dataclass(frozen=True)
class Patch:
    """What of prompt A becomes prompt B's, and at which positions; BOS never does.

    Kinds: `z of head`, `z of layer` (of all heads); `feature`: f of B in place of f of A, so that z changes by
    (f_B - f_A) W_dec; `features of head`: that of all features of a head. What the SAE leaves unexplained in A stays.
    """

    kind: Kind
    which: int = 0
    """global feature id, or head; of no meaning for the layer"""
    first: int | None = None
    last: int | None = None
    """positions of A; None: as far as both prompts reach"""
    shift: int = 0
    """position p of A takes p + shift of B"""


def proposed_shift(run: PromptRun, other: PromptRun) -> int:
    """The shift by which both prompts end together; 0 where they are equally long."""
    return len(other.tokens) - len(run.tokens)


def patch(
    layer: "Layer", sae: BlockDiagSAE, run: PromptRun, other: PromptRun, patched: Patch, position: int = -1
) -> Effect:
    """Patch `run` (A) from `other` (B), both of this layer and SAE, and predict the token after `position` of A.

    Raises:
        ValueError: the prompts were run through different checkpoints, or there is no such feature, head or position.
    """
    return effect_of(layer, run, _change(layer, sae, run, other, patched), position)


def patch_every_head(
    layer: "Layer",
    sae: BlockDiagSAE,
    run: PromptRun,
    other: PromptRun,
    patched: Patch,
    tokens: tuple[int, int],
    position: int = -1,
) -> pd.DataFrame:
    """`patch` one head after the other and look at logit(a) - logit(b) of two tokens: a row per head.

    `clean` is the difference in A, `other` that in B after the corresponding position, `patched` the full answer and
    `direct` the direct one; `recovered` is (patched - clean) / (other - clean), NaN where A and B do not differ.

    Args:
        patched: of a kind of a head; its `which` is of no meaning.
        tokens: a and b.

    Raises:
        ValueError: as `patch`, the kind is not of a head, or B has no such position.
    """
    require(patched.kind.endswith("of head"), f"a {patched.kind} is not patched head by head")
    there = position % len(run.tokens) + patched.shift
    require(0 <= there < len(other.tokens), f"the other prompt has no position {there} to compare the prediction with")
    a, b = tokens
    logits = layer.lm.logits(other.final[there].to(layer.device)[None, None])[0, 0].float()
    in_other = float(logits[a] - logits[b])
    rows = []
    for head in range(layer.n_heads):
        found = patch(layer, sae, run, other, replace(patched, which=head), position).logit_difference(a, b)
        gap = in_other - found["clean"]
        recovered = (found["full"] - found["clean"]) / gap if abs(gap) > _NO_DIFFERENCE else nan
        rows.append((head, found["clean"], in_other, found["full"], found["direct"], recovered))
    return pd.DataFrame(rows, columns=["head", "clean", "other", "patched", "direct", "recovered"])


@torch.no_grad()
def _change(
    layer: "Layer", sae: BlockDiagSAE, run: PromptRun, other: PromptRun, patched: Patch
) -> Float[Tensor, "pos head d_head"]:
    """What a patch adds to the z of A."""
    require(torch.equal(run.W_enc, other.W_enc), "the two prompts were run through different checkpoints")
    check_which(sae, layer.n_heads, patched.kind, patched.which)
    shift, lengths = patched.shift, (len(run.tokens), len(other.tokens))
    first = max(1, 1 - shift) if patched.first is None else patched.first
    last = min(lengths[0], lengths[1] - shift) - 1 if patched.last is None else patched.last
    check_span(first, last, lengths[0])
    check_span(first + shift, last + shift, lengths[1])
    here, there = slice(first, last + 1), slice(first + shift, last + shift + 1)
    delta = torch.zeros_like(run.z, device=layer.device)
    if patched.kind.startswith("z of"):
        taken = (torch.arange(layer.n_heads) == patched.which) | (patched.kind == "z of layer")
        delta[here] = torch.where(taken[:, None], other.z[there] - run.z[here], 0.0).to(layer.device)
    else:
        f = (other.f[there] - run.f[here]).to(layer.device)
        delta[here] = contribution(sae, layer.n_heads, f, patched.kind, patched.which)
    return delta
