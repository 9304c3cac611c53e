"""What a change of a layer's z does to the prediction of the next token.

Two answers, kept apart. Direct: what the change at the predicting position does through W_O, the final norm and the
unembedding, with everything else frozen, the scales of norms too. Full: the rest of the model run again, which adds
what later layers make of the change, at this position and at earlier ones.
"""

from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis.prompt.run import PromptRun
from trainer.config import require

if TYPE_CHECKING:  # it imports transformer_lens, for which pages that run no prompt should not wait
    from trainer.model.lm import Layer


class Effect(NamedTuple):
    """Logits of the next token: as they are, and with the change."""

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
        """The n likeliest tokens and the n whose probability the full answer changes most, likeliest first."""
        clean, full = self.clean.softmax(-1), self.full.softmax(-1)
        ids = torch.cat([clean.topk(n).indices, (full - clean).abs().topk(n).indices]).unique()
        return ids[clean[ids].argsort(descending=True)]

    def logit_difference(self, a: int, b: int) -> dict[str, float]:
        """logit(a) - logit(b) of two tokens: `clean`, `direct` and `full`."""
        return {name: float(logits[a] - logits[b]) for name, logits in self._asdict().items()}


@torch.no_grad()
def effect_of(layer: "Layer", run: PromptRun, delta: Float[Tensor, "pos head d_head"], position: int = -1) -> Effect:
    """The effect of adding `delta` to the z of a prompt on the token after `position`.

    Raises:
        ValueError: there is no such position.
    """
    length = len(run.tokens)
    require(
        -length <= position < length, f"position {position} is out of range: the prompt has {length} tokens with BOS"
    )
    seen = slice(position % length + 1)  # what comes after the position cannot be read there
    delta, z, resid_pre, final = (part[seen].to(layer.device) for part in (delta, run.z, run.resid_pre, run.final))
    changed = layer.final(resid_pre[None], (z + delta)[None])[0]
    before = torch.stack([final[-1], changed[-1]])[:, None]
    clean, full = layer.lm.logits(before)[:, 0].float()
    written = torch.einsum("hd,hdm->m", delta[-1], layer.W_O.float())
    scale = layer.lm.final_scale(before)[0, 0].float() * layer.output_scale(resid_pre[None])[0, -1].float()
    direct = layer.lm.logits_plus(clean, layer.lm.unembed(written).float() / scale)
    return Effect(clean.cpu(), direct.cpu(), full.cpu())
