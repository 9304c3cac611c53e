"""One prompt through one checkpoint: which features fire, and from where their heads read."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis import attribution as dfa
from analysis.tokens import in_text, labels
from trainer.block_diag import BlockDiagSAE
from trainer.config import require

if TYPE_CHECKING:  # it imports transformer_lens, for which pages that run no prompt should not wait
    from trainer.model.lm import Layer


@dataclass(frozen=True)
class PromptRun:
    """What one forward of a prompt left, of which every later question is answered; position 0 is BOS.

    `pattern` and `values` have the model's heads; in a dense SAE every feature is read by all of them.
    """

    tokens: Int[Tensor, " pos"]
    strings: list[str]
    """as in `tokens.in_text`"""
    f: Float[Tensor, "pos block feature"]
    z: Float[Tensor, "pos head d_head"]
    pattern: Float[Tensor, "head query source"]
    values: Float[Tensor, "head source d_head"]
    """v - b_V"""
    W_enc: Float[Tensor, "head d_head feature"]
    """as each head is read (`dfa.Reader`)"""
    slots: Int[Tensor, "query source"]
    resid_pre: Float[Tensor, "pos d_model"]
    """entering the layer, in the model's dtype"""
    final: Float[Tensor, "pos d_model"]
    """before the final norm, in the model's dtype"""

    @cached_property
    def labels(self) -> list[str]:
        """Of every token, `position: token` (`tokens.labels`)."""
        return labels(self.strings)

    @property
    def features_per_block(self) -> int:
        return self.f.shape[-1]

    @property
    def dense(self) -> bool:
        return self.f.shape[1] != len(self.pattern)

    def reads(
        self, head: int, features: Int[Tensor, " feature"] | list[int] | slice = slice(None)
    ) -> Float[Tensor, "source feature"]:
        """(v[s] - b_V) . w of features as one head reads them, by their index in its block."""
        return self.values[head] @ self.W_enc[head][:, features]


@torch.no_grad()
def run_prompt(layer: "Layer", sae: BlockDiagSAE, prompt: str, fuzzy_from: float = 2.0) -> PromptRun:
    """Run a prompt and encode its hook_z of a layer.

    Args:
        fuzzy_from: cosine of embeddings from which tokens are similar, as an analysis of the model has it in its
            meta.json; by default no source is a fuzzy one.

    Raises:
        ValueError: the prompt is empty or too long, or the SAE's sizes are not this model's.
    """
    require(
        sae.d_in == layer.n_heads * layer.d_head,
        f"the SAE reads {sae.d_in} dimensions, but {layer.lm.name} has {layer.n_heads} x {layer.d_head}",
    )
    reader = dfa.Reader(sae, layer)
    tokens = layer.lm.to_tokens(prompt)
    attention, resid_pre, final = layer.forward(tokens)
    z, v, pattern = (part[0].float() for part in attention)
    ids = tokens[0].cpu()
    return PromptRun(
        tokens=ids,
        strings=in_text(layer.lm.token_strings(ids.tolist())),
        f=reader.sae.encode(z).cpu(),
        z=z.cpu(),
        pattern=pattern.cpu(),
        values=(v - reader.b_V).transpose(0, 1).cpu(),
        W_enc=reader.W_enc.cpu(),
        slots=dfa.source_slots(ids, dfa.TokenKinds(layer.lm, ids, fuzzy_from)),
        resid_pre=resid_pre[0].cpu(),
        final=final[0].cpu(),
    )


def firing_map(run: PromptRun) -> pd.DataFrame:
    """How many features fire: one row per head (`all` of a dense SAE) and position but BOS."""
    counts = (run.f > 0).sum(-1)
    total = run.f.sum(-1)
    rows = [
        ("all" if run.dense else head, q, run.labels[q], int(counts[q, head]), float(total[q, head]))
        for head in range(counts.shape[1])
        for q in range(1, len(counts))
    ]
    return pd.DataFrame(rows, columns=["head", "position", "token", "active", "activation"])


def firing(run: PromptRun) -> list[int]:
    """The features that fire on any token but BOS."""
    return (run.f[1:] > 0).any(0).flatten().nonzero()[:, 0].tolist()


def active_features(
    run: PromptRun,
    head: int | None = None,
    span: tuple[int, int] | None = None,
    limit: int = 50,
    source: int | None = None,
    effect: Float[Tensor, "pos block feature"] | None = None,
) -> pd.DataFrame:
    """Features that fire in a head (or dense block) and in a span of positions (None: any), strongest first.

    One row per feature, at most `limit` of each block (quiet heads have small activations), at the position where it
    is strongest within the span; `firings` is on how many positions of the span it fires, `along` its activations on
    the whole prompt [pos]. `share` is the activation's part of everything that fires in that head at that position;
    `reads from` is the source with the largest DFA (summed over heads in a dense SAE), `source share` its part of the
    feature's positive DFA.

    Args:
        span: first and last position.
        source: rank by the DFA from this position instead, in a column `from source`.
        effect: rank by the size of this value of each firing instead (`direct_effects`), in a column `effect`.
    """
    f = run.f.clone()
    f[0] = 0  # BOS is not part of what the SAE is for
    if head is not None:
        f[:, torch.arange(f.shape[1]) != head] = 0
    if span is not None:
        f[: span[0]] = f[span[1] + 1 :] = 0
    rank, ranked_by = f, None
    if source is not None:
        rank = torch.where(f > 0, _from_source(run, source), 0.0)
        ranked_by = "from source"
    elif effect is not None:
        rank = torch.where(f > 0, effect, 0.0)
        ranked_by = "effect"
    strongest, at = (rank.abs() if effect is not None else rank).max(0)  # [block, feature]
    best = strongest.topk(min(limit, strongest.shape[1]))
    block, place = (best.values > 0).nonzero(as_tuple=True)
    order = best.values[block, place].argsort(descending=True)
    block, index = block[order], best.indices[block, place][order]
    q = at[block, index]
    activation, ranking = f[q, block, index], rank[q, block, index]
    attribution = torch.zeros(len(q), len(run.tokens))
    for i in range(len(run.pattern)):  # never the reads of all features at once: a dense SAE has gigabytes of them
        of_head = torch.full_like(block, run.dense, dtype=torch.bool) | (block == i)
        attribution[of_head] += run.pattern[i, q[of_head]] * run.reads(i, index[of_head]).T
    most, read_from = attribution.max(-1)
    positive = attribution.relu().sum(-1)
    return pd.DataFrame(
        {
            "feature": (block * run.features_per_block + index).numpy(),
            "head": block.numpy(),
            "position": q.numpy(),
            "token": [run.labels[i] for i in q.tolist()],
            **({ranked_by: ranking.numpy()} if ranked_by else {}),
            "activation": activation.numpy(),
            "share": (activation / run.f.sum(-1)[q, block]).numpy(),
            "firings": (f[:, block, index] > 0).sum(0).numpy(),
            "along": list(run.f[:, block, index].T.numpy()),
            "reads from": [run.labels[i] for i in read_from.tolist()],
            "slot": [dfa.SLOTS[i] for i in run.slots[q, read_from].tolist()],
            "source share": (most.relu() / positive.clamp_min(1e-12)).numpy(),
        }
    )


def _from_source(run: PromptRun, source: int) -> Float[Tensor, "pos block feature"]:
    """DFA from one source position, of every feature at every destination."""
    reads = torch.einsum("hd,hdf->hf", run.values[:, source], run.W_enc)
    attribution = torch.einsum("hq,hf->hqf", run.pattern[:, :, source], reads)
    return attribution.sum(0)[:, None] if run.dense else attribution.transpose(0, 1)


@torch.no_grad()
def direct_effects(layer: "Layer", sae: BlockDiagSAE, run: PromptRun, token: int) -> Float[Tensor, "pos block feature"]:
    """What each firing adds to the logit of a next token at its own position, by the direct path.

    f (W_dec W_O) . direction of the token / scale of the norms on the way; everything else frozen. Of the logit before
    the soft cap, in a model that has one.
    """
    W_O = layer.W_O.float().reshape(sae.n_blocks, sae.width, -1)
    per_unit = (sae.W_dec @ (W_O @ layer.lm.logit_direction(token).float())[..., None])[..., 0]
    resid_pre, final = (part[None].to(layer.device) for part in (run.resid_pre, run.final))
    scale = layer.lm.final_scale(final)[0].float() * layer.output_scale(resid_pre)[0].float()
    return run.f * (per_unit / scale[..., None]).cpu()


def source_attribution(run: PromptRun, block: int, index: int, position: int) -> pd.DataFrame:
    """Exact DFA of one feature at one position: a row per source (and per head, in a dense SAE).

    `attention` is A[q, s] (where the head looks), `read` is (v[s] - b_V) . w (what is there for the
    feature), `dfa` their product. Their sum and the constant make up the pre-activation.
    """
    seen = slice(position + 1)
    tokens = run.labels[: position + 1]
    slots = [dfa.SLOTS[i] for i in run.slots[position, seen].tolist()]
    parts = []
    for head in range(len(run.pattern)) if run.dense else [block]:
        attention, read = run.pattern[head, position, seen], run.reads(head, [index])[seen, 0]
        columns = {"head": head, "source": range(position + 1), "token": tokens, "slot": slots}
        weights = {"attention": attention, "read": read, "dfa": attention * read}
        parts.append(pd.DataFrame(columns | {name: weight.numpy() for name, weight in weights.items()}))
    return pd.concat(parts, ignore_index=True)


def positive_dfa(run: PromptRun) -> Float[Tensor, "head query source"]:
    """Sum over the features that fire at a destination of max(0, DFA) from a source."""
    heads = range(len(run.pattern))
    active = (run.f > 0).float().expand(-1, len(heads), -1)  # every head is read by every feature if dense
    return torch.cat([dfa.positive_mass(run.pattern[[h]], run.reads(h)[None], active[:, [h]]) for h in heads])


def roles(run: PromptRun) -> pd.DataFrame:
    """What each head does on this prompt: the share of its attention, and of its features' positive
    DFA, that falls on each source slot. One row per head and slot."""
    heads = range(len(run.pattern))
    attention, attribution = (
        dfa.shares(dfa.mass_per_slot(mass, run.slots)).flatten().tolist() for mass in (run.pattern, positive_dfa(run))
    )
    head, slot = np.repeat(heads, len(dfa.SLOTS)), len(heads) * dfa.SLOTS
    return pd.DataFrame({"head": head, "slot": slot, "attention": attention, "dfa": attribution})


def role_table(shares: pd.DataFrame) -> pd.DataFrame:
    """The largest slot of each head by attention and by DFA, and whether the two agree."""
    rows = []
    for head, of_head in shares.groupby("head"):
        slots, by_attention, by_dfa = (of_head[name].to_numpy() for name in ("slot", "attention", "dfa"))
        looks, reads, fires = slots[by_attention.argmax()], slots[by_dfa.argmax()], by_dfa.sum() > 0
        reads = reads if fires else "nothing fires"
        rows.append((head, looks, by_attention.max(), reads, by_dfa.max(), bool(looks == reads)))
    columns = ["head", "by attention", "attention share", "by DFA", "DFA share", "agree"]
    return pd.DataFrame(rows, columns=columns)
