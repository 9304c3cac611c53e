"""What replacing z does to a model's predictions, token by token; what no SAE changes is computed once for a layer."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from trainer import clustered, ranks
from trainer.block_diag import BlockDiagSAE
from trainer.files import load_tensors, save_tensors
from trainer.model.lm import Layer

_BATCH_TOKENS = 1024  # of one forward to the logits: 200 MB of them with 49,152 tokens in the vocabulary
_HEAD_CONTEXTS = 2  # of one forward with a single head replaced
_MEASURABLE = 3  # standard errors above 0 from which zeroing has an effect, so that a score has a denominator
# Heads are replaced alone on the first contexts until the KL of zeroing each is measurable, on at least and at most
# these shares of them: the same ones for every SAE, because zeroing decides. Of few contexts an error is no error.
_HEAD_SHARES = (1 / 8, 1 / 2)
_LEAST_CONTEXTS = 8


class Effect(NamedTuple):
    """Per-token effect of replacing z: next-token loss, and KL from the clean distribution (nats)."""

    ce: Float[Tensor, "*replacement context token"]
    kl: Float[Tensor, "*replacement context token"]


class Effects(NamedTuple):
    """On one text: of nothing, of ablations, and of each SAE; with one head replaced, on fewer contexts."""

    clean: Float[Tensor, "context token"]
    """next-token loss"""
    zero: Effect
    mean: Effect
    saes: Effect
    """[sae, context, token]"""
    zero_heads: Effect
    """[head, fewer contexts, token]"""
    sae_heads: Effect
    """[sae, head, fewer contexts, token]"""


def effects(
    layer: Layer,
    tokens: Int[Tensor, "context pos"],
    prefixes: list[tuple[Float[Tensor, "_ pos d_model"], Float[Tensor, "_ pos head d_head"]]],
    mean: Float[Tensor, "head d_head"],
    saes: list[BlockDiagSAE],
    first_scored: int,
    per_head: bool,
    cache: Path | None,
    progress: bool,
) -> Effects:
    """Run the model on from a layer, with z replaced at every position but BOS.

    CE and KL are scored at positions from `first_scored` on where the next token is known. Several processes
    (`trainer.ranks`) share the runs, one replacement each at a time, and all have all results: those of one process.

    Args:
        prefixes: of `split(tokens)`, from `Layer.prefix`.
        mean: of z, for mean ablation.
        saes: for raw hook_z of the layer.
        cache: folder in which what no SAE changes is kept; None keeps nothing.
    """
    file = cache and cache / f"{_key(layer, tokens, first_scored, per_head)}.safetensors"
    kept = _load(file, layer.device)
    kept = None if ranks.any_of(kept is None) else kept
    parts: dict[str, list[Effect]] = {}
    n_scored = tokens.shape[1] - 1 - first_scored  # of a context
    head_contexts = 0
    heads_done = not per_head
    quiet = not (progress and ranks.is_first())
    for index, chunk in enumerate(tqdm(split(tokens), "Evaluating", disable=quiet, dynamic_ncols=True)):
        resid, z = prefixes[index]
        scorer = Scorer(layer, chunk, resid, first_scored)
        parts.setdefault("clean", []).append(Effect(scorer.clean_ce, torch.zeros_like(scorer.clean_ce)))
        reconstructions = [_but_bos(z, sae(z.float())) for sae in saes]
        replacements = {f"sae {i}": z_hat for i, z_hat in enumerate(reconstructions)}
        if kept is None:
            zeroed = _but_bos(z, torch.zeros_like(z))
            replacements |= {"zero": zeroed, "mean": _but_bos(z, mean.expand_as(z))}
        for name, effect in zip(replacements, _scored(scorer, replacements.values()), strict=True):
            parts.setdefault(name, []).append(Effect(*effect))
        for few in torch.arange(len(chunk)).split(_HEAD_CONTEXTS):
            if heads_done:
                break
            part = scorer.on(few)
            replacements = {f"sae {i}": z_hat[few] for i, z_hat in enumerate(reconstructions)}
            if kept is None:
                replacements["zero"] = zeroed[few]
            one_head = chain.from_iterable(_one_head(z[few], each) for each in replacements.values())
            of_heads = torch.stack(_scored(part, one_head)).unflatten(0, (len(replacements), layer.n_heads))
            for name, effect in zip(replacements, of_heads.transpose(1, 2), strict=True):
                parts.setdefault(f"{name} heads", []).append(Effect(*effect))
            head_contexts += len(few)
            if kept is None:
                so_far = _joined(parts["zero heads"]).kl.unflatten(-1, (head_contexts, n_scored))
                heads_done = head_contexts >= _enough(so_far, len(tokens))
            else:
                heads_done = head_contexts * n_scored >= kept.zero_heads.kl.shape[1]
    if kept is None:
        nothing = Effect(*(torch.zeros(layer.n_heads, 0, device=layer.device) for _ in range(2)))
        zero_heads = _joined(parts["zero heads"]) if per_head else nothing
        kept = _Kept(_joined(parts["zero"]), _joined(parts["mean"]), zero_heads)
        _save(file, kept)
    of_saes = [_joined(parts[f"sae {i}"]) for i in range(len(saes))]
    sae_heads = [_joined(parts[f"sae {i} heads"]) for i in range(len(saes))] if per_head else []
    every = kept.zero, kept.mean, _stacked(of_saes), kept.zero_heads, _stacked(sae_heads)
    return Effects(
        _joined(parts["clean"]).ce.unflatten(-1, (-1, n_scored)),
        *(Effect(*(_by_context(values, n_scored) for values in effect)) for effect in every),
    )


def measurable(ablation: Float[Tensor, "*head context token"]) -> Bool[Tensor, "*head"]:
    """Whether zeroing has an effect that a score can be a share of: not where removing helps, or one cannot tell."""
    effect, se = clustered.mean(ablation)
    return effect > _MEASURABLE * se


def runs_per_token(n_heads: int, n_saes: int, n_contexts: int) -> float:
    """How often `effects` runs the model on from a layer, per token: about, because heads are replaced on a share."""
    share = sum(_shares(n_contexts)) / 2
    return 3 + n_saes + n_heads * (1 + n_saes) * share


def _scored(scorer: "Scorer", replacements: Iterable[Tensor]) -> list[Float[Tensor, "effect token"]]:
    """CE and KL of each."""

    def score(z: Tensor) -> Tensor:
        return torch.stack(scorer(z))

    return ranks.dealt(score, replacements, (2, len(scorer.targets)), scorer.clean)


def split(tokens: Int[Tensor, "context pos"]) -> tuple[Int[Tensor, "_ pos"], ...]:
    """Contexts of one forward each."""
    return tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1]))


class _Kept(NamedTuple):
    zero: Effect
    mean: Effect
    zero_heads: Effect


class Scorer:
    """Scores replacements of z on one batch against the clean run."""

    def __init__(
        self,
        layer: Layer,
        tokens: Int[Tensor, "context pos"],
        resid: Float[Tensor, "context pos d_model"],
        first_scored: int,
        clean: Float[Tensor, "token d_vocab"] | None = None,
    ) -> None:
        self.layer, self.tokens, self.resid, self.first = layer, tokens, resid, first_scored
        self.targets = tokens[:, first_scored + 1 :].flatten()
        self.clean = self._log_probs(None) if clean is None else clean
        self.clean_ce = F.nll_loss(self.clean, self.targets, reduction="none")

    def on(self, contexts: Int[Tensor, " context"]) -> "Scorer":
        """Of some of the contexts, without running them again."""
        clean = self.clean.view(len(self.tokens), -1, self.clean.shape[1])[contexts].flatten(0, 1)
        return Scorer(self.layer, self.tokens[contexts], self.resid[contexts], self.first, clean)

    def __call__(self, z: Float[Tensor, "context pos head d_head"]) -> Effect:
        log_probs = self._log_probs(z)
        kl = F.kl_div(log_probs, self.clean, log_target=True, reduction="none").sum(-1)
        return Effect(F.nll_loss(log_probs, self.targets, reduction="none"), kl)

    def several(self, z: Float[Tensor, "replacement context pos head d_head"]) -> Effect:
        """Of replacements that run together."""
        n = len(z)
        if n == 1:
            return Effect(*(each[None] for each in self(z[0])))
        runs = Scorer(
            self.layer, self.tokens.repeat(n, 1), self.resid.repeat(n, 1, 1), self.first, self.clean.repeat(n, 1)
        )
        return Effect(*(each.unflatten(0, (n, -1)) for each in runs(z.flatten(0, 1))))

    def _log_probs(self, z: Float[Tensor, "context pos head d_head"] | None) -> Float[Tensor, "token d_vocab"]:
        final = self.layer.final(self.resid, z)[:, self.first : -1]  # only what is scored is unembedded
        return self.layer.lm.logits(final).flatten(0, 1).float().log_softmax(-1)


def _but_bos(
    z: Float[Tensor, "context pos head d_head"], replacement: Float[Tensor, "context pos head d_head"]
) -> Float[Tensor, "context pos head d_head"]:
    return torch.cat([z[:, :1], replacement[:, 1:].to(z.dtype)], dim=1)


def _one_head(
    z: Float[Tensor, "context pos head d_head"], replacement: Float[Tensor, "context pos head d_head"]
) -> Iterator[Float[Tensor, "context pos head d_head"]]:
    """z with one head after the other replaced."""
    for head in range(z.shape[2]):
        one = z.clone()
        one[:, :, head] = replacement[:, :, head]
        yield one


def _enough(kl: Float[Tensor, "head context token"], n_contexts: int) -> float:
    """Contexts of all on which heads have to be replaced alone, as far as these tell."""
    least, most = _shares(n_contexts)
    return n_contexts * (least if measurable(kl).all() else most)


def _shares(n_contexts: int) -> tuple[float, float]:
    """Of the contexts, on which heads are replaced alone: at least and at most."""
    least, most = (max(share, _LEAST_CONTEXTS / n_contexts) for share in _HEAD_SHARES)
    return min(least, 1), min(most, 1)


def _by_context(values: Float[Tensor, "*replacement scored"], n: int) -> Float[Tensor, "*replacement context token"]:
    return values.reshape(*values.shape[:-1], values.shape[-1] // n, n)


def _joined(parts: list[Effect]) -> Effect:
    return Effect(*(torch.cat(each, dim=-1) for each in zip(*parts, strict=True)))


def _stacked(rows: list[Effect]) -> Effect:
    return Effect(*map(torch.stack, zip(*rows, strict=True))) if rows else Effect(torch.empty(0), torch.empty(0))


def _key(layer: Layer, tokens: Int[Tensor, "context pos"], first_scored: int, per_head: bool) -> str:
    """A name for what is kept: everything that decides it."""
    lm = layer.lm
    heads = (_MEASURABLE, _HEAD_SHARES, _LEAST_CONTEXTS) if per_head else None
    what = f"{lm.fingerprint()} {layer.index} {lm.dtype} {first_scored} {heads}"
    digest = hashlib.sha256(what.encode() + tokens.cpu().numpy().tobytes()).hexdigest()[:16]
    return f"{Path(lm.name).name}-{layer.index}-{digest}"


def _load(file: Path | None, device: torch.device) -> _Kept | None:
    try:
        kept = {name: value.to(device) for name, value in load_tensors(file).items()} if file else {}
        return _Kept(*(Effect(kept[f"{name}.ce"], kept[f"{name}.kl"]) for name in _Kept._fields))
    except (ValueError, KeyError):  # not there, or damaged: it is made again
        return None


@ranks.by_first
def _save(file: Path | None, kept: _Kept) -> None:
    if file is None:
        return
    tensors = {
        f"{name}.{what}": value for name, effect in kept._asdict().items() for what, value in effect._asdict().items()
    }
    with suppress(OSError):  # a folder that cannot be written costs the next evaluation time, not this one its result
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, tensors)
