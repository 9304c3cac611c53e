"""Take features or heads away on a prompt, scale or clamp them, and see the next-token distribution change."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analysis.logits import head_of_features
from analysis.prompt.effect import Effect, effect_of
from analysis.prompt.run import PromptRun
from trainer.block_diag import BlockDiagSAE
from trainer.config import require

if TYPE_CHECKING:  # it imports transformer_lens, for which pages that run no prompt should not wait
    from trainer.model.lm import Layer

Kind = Literal[
    "scale feature", "scale features of head", "clamp feature", "head by reconstruction", "layer by reconstruction"
]


@dataclass(frozen=True)
class Intervention:
    """What is changed of a layer's z, and at which positions; BOS never is.

    Kinds: `scale feature`: its activation f becomes `amount` times f (0 takes it away); `scale features of head`: those
    of all features of a head do; `clamp feature`: f becomes `amount`, also where the feature does not fire. What the
    SAE leaves unexplained stays. `head by reconstruction`: a head's z becomes the SAE's; `layer by reconstruction`:
    that of all heads does, which is the model with the SAE spliced in.
    """

    kind: Kind
    which: int = 0
    """global feature id, or head; of no meaning for the layer"""
    amount: float = 0.0
    """factor or activation; of no meaning for reconstructions"""
    first: int = 1
    last: int | None = None
    """None: every position from `first` on"""

    def at(self, length: int) -> Bool[Tensor, " pos"]:
        """Which of `length` positions are changed."""
        positions = torch.arange(length)
        return (positions >= max(self.first, 1)) & (positions <= (length if self.last is None else self.last))


def intervene(
    layer: "Layer", sae: BlockDiagSAE, run: PromptRun, intervention: Intervention, position: int = -1
) -> Effect:
    """Intervene on a prompt that `run_prompt` ran with this layer and SAE, and predict the token after `position`.

    Raises:
        ValueError: there is no such feature, head or position.
    """
    length = len(run.tokens)
    check_span(intervention.first, length - 1 if intervention.last is None else intervention.last, length)
    delta = change(sae, run.f.to(layer.device), run.z.to(layer.device), intervention)
    delta[~intervention.at(length)] = 0
    return effect_of(layer, run, delta, position)


@torch.no_grad()
def change(
    sae: BlockDiagSAE,
    f: Float[Tensor, "... block feature"],
    z: Float[Tensor, "... head d_head"],
    intervention: Intervention,
) -> Float[Tensor, "... head d_head"]:
    """What an intervention adds to z at the positions where it is made.

    Raises:
        ValueError: there is no such feature or head.
    """
    kind, which, amount = intervention.kind, intervention.which, intervention.amount
    n_heads = z.shape[-2]
    check_which(sae, n_heads, kind, which)
    if kind.endswith("reconstruction"):
        replaced = (torch.arange(n_heads, device=z.device) == which) | (kind == "layer by reconstruction")
        return torch.where(replaced[:, None], sae.decode(f).reshape(z.shape) - z, 0.0)
    f_after = torch.full_like(f, amount) if kind == "clamp feature" else amount * f
    return contribution(sae, n_heads, f_after - f, kind, which)


def contribution(
    sae: BlockDiagSAE, n_heads: int, f: Float[Tensor, "... block feature"], kind: str, which: int
) -> Float[Tensor, "... head d_head"]:
    """f W_dec of one feature, or of all features of a head where `kind` ends so."""
    of_feature = head_of_features(sae, n_heads)[0] if kind.endswith("of head") else torch.arange(sae.d_sae)
    chosen = (of_feature == which).view(sae.n_blocks, sae.features_per_block).to(f.device)
    return (sae.decode(torch.where(chosen, f, 0.0)) - sae.b_dec).reshape(*f.shape[:-2], n_heads, -1)


def check_which(sae: BlockDiagSAE, n_heads: int, kind: str, which: int) -> None:
    """See that there is such a feature, or head.

    Raises:
        ValueError: there is none.
    """
    what, n = ("feature", sae.d_sae) if kind.endswith("feature") else ("head", n_heads)
    require(0 <= which < n, f"there is no {what} {which}: ids run from 0 to {n - 1}")


def check_span(first: int, last: int, length: int) -> None:
    """See that positions `first` to `last` are some of a prompt's, and not BOS.

    Raises:
        ValueError: they are not.
    """
    require(
        1 <= first <= last < length,
        f"positions {first} to {last} are no span of 1 to {length - 1}: position 0 is BOS, which is never changed",
    )
