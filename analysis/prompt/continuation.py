"""What the model writes after a prompt, as it is and with an intervention."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analysis.prompt.intervene import Intervention, change, check_span
from analysis.prompt.run import PromptRun
from analysis.tokens import in_text
from trainer.block_diag import BlockDiagSAE
from trainer.config import require

if TYPE_CHECKING:  # it imports transformer_lens, for which pages that run no prompt should not wait
    from trainer.model.lm import Layer


class Continuation(NamedTuple):
    """New tokens, up to EOS where that was chosen, and log-probabilities (nats) of each given all before it."""

    ids: list[int]
    strings: list[str]
    clean: Float[Tensor, " token"]
    """by the model as it is"""
    edited: Float[Tensor, " token"]
    """by the model with the intervention"""


@torch.no_grad()
def continue_prompt(
    layer: "Layer",
    sae: BlockDiagSAE,
    run: PromptRun,
    intervention: Intervention,
    n: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[Continuation, Continuation]:
    """Up to `n` new tokens by the model as it is, and by the model with an intervention.

    An intervention without a last position goes on at new tokens. Both texts are drawn with the same uniform random
    numbers, by inverting the distribution function over token ids, so they differ only where the distributions do.

    Args:
        temperature: of the draws, 0 for the likeliest token; log-probabilities are those at temperature 1.

    Raises:
        ValueError: there is no such feature, head or position, `n` is below 1 or `temperature` below 0, or prompt and
            new tokens are more than the model reads.
    """
    lm, length = layer.lm, len(run.tokens)
    require(n >= 1, f"there is nothing to write: {n} new tokens")
    require(temperature >= 0, f"temperature {temperature} is below 0")
    require(
        length + n <= lm.n_ctx,
        f"the prompt has {length} tokens with BOS and {n} are to follow, but {lm.name} reads at most {lm.n_ctx}",
    )
    n_read = length + n - 1  # the last new token is never read
    check_span(intervention.first, n_read - 1 if intervention.last is None else intervention.last, n_read)
    at = intervention.at(n_read).to(layer.device)
    tokens, past, n_past = run.tokens.repeat(2, 1), lm.no_past(2), 0
    ended, eos = torch.zeros(2, dtype=torch.bool), lm.tokenizer.eos_token_id
    for uniform in torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64):
        edit = _edit(sae, intervention, at[n_past : tokens.shape[1]], rows=slice(1, 2))
        final = layer.edited(tokens[:, n_past:], edit, past)
        n_past = tokens.shape[1]
        chosen = _choose(lm.logits(final[:, -1:])[:, 0].cpu().double(), temperature, uniform)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        ended |= chosen == eos
        if ended.all():
            break
    return _scored(layer, sae, intervention, at, tokens, length)


def _scored(
    layer: "Layer",
    sae: BlockDiagSAE,
    intervention: Intervention,
    at: Bool[Tensor, " read"],
    tokens: Int[Tensor, "2 pos"],
    length: int,
) -> tuple[Continuation, Continuation]:
    """Each text up to its EOS, with its log-probabilities by both models: each reads both texts at once."""
    read, new = tokens[:, :-1], tokens[:, length:]
    by_model = []
    for edit in (lambda z: z, _edit(sae, intervention, at[: read.shape[1]], rows=slice(None))):
        final = layer.edited(read, edit)
        log_probabilities = layer.lm.logits(final[:, length - 1 :]).float().log_softmax(-1).cpu()
        by_model.append(log_probabilities.gather(-1, new[..., None])[..., 0])
    texts = []
    for row, ids in enumerate(new.tolist()):
        eos = layer.lm.tokenizer.eos_token_id
        ids = ids[: ids.index(eos) + 1] if eos in ids else ids
        clean, edited = (each[row, : len(ids)] for each in by_model)
        texts.append(Continuation(ids, in_text(layer.lm.token_strings(ids)), clean, edited))
    return texts[0], texts[1]


def _edit(
    sae: BlockDiagSAE, intervention: Intervention, at: Bool[Tensor, " pos"], rows: slice
) -> Callable[[Tensor], Tensor]:
    """The intervention on some rows of z, as a function of it."""

    def edit(z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        edited = z.to(torch.float32, copy=True)
        delta = change(sae, sae.encode(edited[rows]), edited[rows], intervention)
        edited[rows] += torch.where(at[:, None, None], delta, 0.0)
        return edited

    return edit


def _choose(
    logits: Float[Tensor, "row d_vocab"], temperature: float, uniform: Float[Tensor, ""]
) -> Int[Tensor, " row"]:
    """The likeliest token of each row, or the one at which its distribution function passes `uniform`."""
    if temperature == 0:
        return logits.argmax(-1)
    passed = (logits / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(passed, uniform * passed[:, -1:], right=True)[:, 0]
