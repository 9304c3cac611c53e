"""What a model loses without one head: next-token loss and KL from the clean model, one head removed at a time.

The residual stream is carried on a layer at a time, so what comes before the head is never run again.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from trainer.effects import Scorer, split
from trainer.model.lm import LanguageModel

_TOGETHER = {"cpu": 1024}  # tokens of the heads that run together: a CPU gains nothing by more
_TOGETHER_ELSEWHERE = 4096


class Removal(NamedTuple):
    """Sums over the scored tokens of each context, in nats."""

    n_scored: int
    """tokens of a context"""
    clean_ce: Float[Tensor, " context"]
    ce: dict[str, Float[Tensor, "layer head context"]]
    """loss without the head less the clean one, by ablation"""
    kl: dict[str, Float[Tensor, "layer head context"]]
    """KL(clean || without the head)"""


def derangement(n: int, seed: int) -> Int[Tensor, " n"]:
    """For each of n contexts another one, all different: a random cycle; n must be at least 2."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other


@torch.no_grad()
def remove(
    lm: LanguageModel,
    tokens: Int[Tensor, "context pos"],
    first_scored: int,
    ablations: Sequence[str],
    seed: int,
    what: str,
    say: Callable[[str], object] = print,
) -> Removal:
    """Replace the hook_z of one head after the other, of all layers, at every position but BOS.

    By 0, by its mean over these contexts and positions, or by that of the same position of another context
    (`derangement`). Scored at positions from `first_scored` on where the next token is known.

    Args:
        ablations: of `analysis.heads.table.ABLATIONS`.
        what: beside the progress bar.
        say: told how long it will take, about.
    """
    tokens = tokens.to(lm.device)
    n_contexts, length = tokens.shape
    parts = torch.arange(n_contexts).split(len(split(tokens)[0]))
    n_scored, shape = length - 1 - first_scored, (lm.n_layers, lm.n_heads, n_contexts)
    ce, kl = ({name: torch.zeros(shape, dtype=torch.float64) for name in ablations} for _ in range(2))
    clean_ce = torch.zeros(n_contexts, dtype=torch.float64)

    started = time.monotonic()
    resid = lm.enter(tokens)
    final = torch.cat([lm.layer(0).final(resid[part]) for part in parts])
    through_layers = time.monotonic() - started
    for part in parts:
        loss = F.nll_loss(_clean(lm, final[part], first_scored), _targets(tokens[part], first_scored), reduction="none")
        clean_ce[part] = loss.cpu().double().view(len(part), -1).sum(1)
    to_loss = time.monotonic() - started - through_layers
    runs = lm.n_layers * lm.n_heads * len(ablations)
    seconds = runs * (through_layers * (lm.n_layers + 1) / 2 / lm.n_layers + 2 * to_loss)
    say(f"{what}: {runs:,} runs over {n_contexts * n_scored:,} scored tokens, about {seconds / 60:.0f} min")

    total = sum(range(1, lm.n_layers + 1)) * lm.n_heads * len(ablations) * n_contexts * (length - 1)
    with tqdm(desc=what, total=total, unit="tok·layer", unit_scale=True, dynamic_ncols=True) as bar:
        for layer in map(lm.layer, range(lm.n_layers)):
            steps = [layer.step(resid[part]) for part in parts]
            z = torch.cat([attention.z for attention, _ in steps])
            for part in parts:
                clean = _clean(lm, final[part], first_scored)
                scorer = Scorer(layer, tokens[part], resid[part], first_scored, clean)
                for name in ablations:
                    instead = _instead(z, name, seed)[part]
                    for heads in torch.arange(lm.n_heads).split(_heads_together(lm, tokens[part])):
                        effect = scorer.several(_without(z[part], instead, heads))
                        for sums, of_token in ((ce, effect.ce - scorer.clean_ce), (kl, effect.kl)):
                            by_context = of_token.cpu().double().unflatten(1, (len(part), -1)).sum(-1)
                            sums[name][layer.index, heads[:, None], part] = by_context
                        bar.update((lm.n_layers - layer.index) * len(heads) * len(part) * (length - 1))
            resid = torch.cat([after for _, after in steps])
    return Removal(n_scored, clean_ce, ce, kl)


def _instead(
    z: Float[Tensor, "context pos head d_head"], ablation: str, seed: int
) -> Float[Tensor, "context pos head d_head"]:
    """What stands in the place of z; BOS is left alone later."""
    if ablation == "zero":
        return torch.zeros_like(z)
    if ablation == "mean":
        return z[:, 1:].float().mean((0, 1)).to(z.dtype).expand_as(z)
    return z[derangement(len(z), seed).to(z.device)]


def _without(
    z: Float[Tensor, "context pos head d_head"],
    instead: Float[Tensor, "context pos head d_head"],
    heads: Int[Tensor, " replacement"],
) -> Float[Tensor, "replacement context pos head d_head"]:
    """z once for each of some heads, with that one replaced."""
    each = z.repeat(len(heads), 1, 1, 1, 1)
    for replaced, head in zip(each, heads.tolist(), strict=True):
        replaced[:, 1:, head] = instead[:, 1:, head]
    return each


def _heads_together(lm: LanguageModel, tokens: Int[Tensor, "context pos"]) -> int:
    return max(1, _TOGETHER.get(lm.device.type, _TOGETHER_ELSEWHERE) // tokens.numel())


def _clean(
    lm: LanguageModel, final: Float[Tensor, "context pos d_model"], first_scored: int
) -> Float[Tensor, "token d_vocab"]:
    """Log-probabilities of the next token; one unembedding is cheaper than to keep them for a whole text."""
    return lm.logits(final[:, first_scored:-1]).flatten(0, 1).float().log_softmax(-1)


def _targets(tokens: Int[Tensor, "context pos"], first_scored: int) -> Int[Tensor, " token"]:
    return tokens[:, first_scored + 1 :].flatten()
