"""Take a feature or a head away on a prompt, and see the next-token distribution change.

Two answers, kept apart. Direct: what the change of z at the predicting position does through W_O, the final norm and
the unembedding, with everything else frozen, the scales of norms too. Full: the rest of the model run again, which adds
what later layers make of the change, at this position and at earlier ones.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis.logits import head_of_features
from analysis.prompt.run import PromptRun
from trainer.block_diag import BlockDiagSAE
from trainer.config import require

if TYPE_CHECKING:  # it imports transformer_lens, for which pages that run no prompt should not wait
    from trainer.model.lm import Layer

Kind = Literal["feature", "features of head", "head by reconstruction", "layer by reconstruction"]


class Ablation(NamedTuple):
    """Logits of the next token: as they are, and with the ablation."""

    clean: Float[Tensor, " d_vocab"]
    direct: Float[Tensor, " d_vocab"]
    full: Float[Tensor, " d_vocab"]

    def table(self, ids: Int[Tensor, " token"]) -> pd.DataFrame:
        """Changes for given tokens: of the logit, and of the log-probability in nats, direct and full."""
        columns = {"id": ids.tolist(), "probability": self.clean.softmax(-1)[ids].tolist()}
        for name, logits in (("direct", self.direct), ("full", self.full)):
            columns[f"{name} logit change"] = (logits - self.clean)[ids].tolist()
            change = logits.log_softmax(-1) - self.clean.log_softmax(-1)
            columns[f"{name} log-probability change"] = change[ids].tolist()
            columns[f"{name} probability"] = logits.softmax(-1)[ids].tolist()
        return pd.DataFrame(columns)

    def most_changed(self, n: int = 10) -> Int[Tensor, " token"]:
        """The n likeliest tokens and the n whose probability the full ablation changes most, likeliest first."""
        clean, full = self.clean.softmax(-1), self.full.softmax(-1)
        ids = torch.cat([clean.topk(n).indices, (full - clean).abs().topk(n).indices]).unique()
        return ids[clean[ids].argsort(descending=True)]


@torch.no_grad()
def ablate(
    layer: "Layer",
    sae: BlockDiagSAE,
    run: PromptRun,
    kind: Kind,
    which: int,
    position: int = -1,
    only_at: int | None = None,
) -> Ablation:
    """Ablate on a prompt that `run_prompt` ran with this layer and SAE, and predict the token after `position`.

    Args:
        kind: `feature`: its contribution f W_dec is taken out of z, what the SAE leaves unexplained stays;
            `features of head`: those of all features of a head; `head by reconstruction`: a head's z becomes the
            SAE's; `layer by reconstruction`: that of all heads does, which is the model with the SAE spliced in.
        which: global feature id, or head; of no meaning for the layer.
        only_at: the one position at which z is changed; default all but BOS.

    Raises:
        ValueError: there is no such feature, head or position.
    """
    length = len(run.tokens)
    for name, at in (("position", position), ("only_at", only_at)):
        inside = at is None or -length <= at < length
        require(inside, f"{name} {at} is out of range: the prompt has {length} tokens with BOS")
    f, z, resid_pre, final = (part.to(layer.device) for part in (run.f, run.z, run.resid_pre, run.final))
    delta = _change(sae, layer.n_heads, f, z, kind, which)
    keep = torch.ones(length, dtype=torch.bool, device=delta.device)
    if only_at is not None:
        keep = torch.arange(length, device=delta.device) == only_at % length
    keep[0] = False
    delta[~keep] = 0
    without = layer.final(resid_pre[None], (z + delta)[None])[0]
    before = torch.stack([final[position], without[position]])[:, None]
    clean, full = layer.lm.logits(before)[:, 0].float()
    written = torch.einsum("hd,hdm->m", delta[position], layer.W_O.float())
    scale = layer.lm.final_scale(before)[0, 0].float() * layer.output_scale(resid_pre[None])[0, position].float()
    direct = layer.lm.logits_plus(clean, layer.lm.unembed(written).float() / scale)
    return Ablation(clean.cpu(), direct.cpu(), full.cpu())


def _change(
    sae: BlockDiagSAE,
    n_heads: int,
    f: Float[Tensor, "pos block feature"],
    z: Float[Tensor, "pos head d_head"],
    kind: Kind,
    which: int,
) -> Float[Tensor, "pos head d_head"]:
    """What the ablation adds to z."""
    what, n = ("feature", sae.d_sae) if kind == "feature" else ("head", n_heads)
    require(0 <= which < n, f"there is no {what} {which}: ids run from 0 to {n - 1}")
    if kind.endswith("reconstruction"):
        delta = sae.decode(f).reshape(z.shape) - z
        replaced = (torch.arange(n_heads, device=z.device) == which) | (kind == "layer by reconstruction")
        return torch.where(replaced[:, None], delta, 0.0)
    of_feature = torch.arange(sae.d_sae) if kind == "feature" else head_of_features(sae, n_heads)[0]
    gone = (of_feature == which).view(sae.n_blocks, sae.features_per_block).to(z.device)
    return (sae.b_dec - sae.decode(torch.where(gone, f, 0.0))).reshape(z.shape)
