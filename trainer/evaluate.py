"""Held-out metrics: what an SAE keeps of the activations, and of the model's predictions.

Every metric leaves the BOS position out: it is not reconstructed, not replaced and not scored.
Definitions are those of the README; several SAEs of one layer share every forward that does not
depend on them, so they are evaluated on the same tokens by construction.

    python -m trainer.evaluate checkpoints/<name> ... [--tokens N]     writes eval.json anew
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from trainer import cli
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint, by_origin
from trainer.config import TrainingConfig
from trainer.files import write_json
from trainer.model.lm import LanguageModel, Layer, pick_device

_PER_HEAD_TOKENS = 2048  # replacing one head at a time is 2 n_heads forwards a batch, so fewer tokens have to do
_BATCH_TOKENS = 1024  # of one forward to the logits: 200 MB of them with 49,152 tokens in the vocabulary


class Effect(NamedTuple):
    """Per-token effect of replacing z: next-token loss, and KL from the clean distribution (nats)."""

    ce: Float[Tensor, " token"]
    kl: Float[Tensor, " token"]


def evaluate(
    layer: Layer,
    saes: list[BlockDiagSAE],
    held_out: Int[Tensor, "context pos"],
    seed: int,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """The contents of eval.json for each SAE.

    Args:
        layer: of the model that the SAEs were trained on.
        saes: for its raw hook_z.
        held_out: contexts beginning with BOS.
        seed: of the repeated random tokens.
    """
    half = (held_out.shape[1] - 1) // 2
    repeated = repeated_tokens(layer.lm, len(held_out), half, seed)
    on_text = evaluate_tokens(layer, saes, held_out, 1, progress=progress)
    on_repeats = evaluate_tokens(layer, saes, repeated, 1 + half, progress=progress)
    return [{**text, "induction": induction} for text, induction in zip(on_text, on_repeats, strict=True)]


def evaluate_checkpoints(paths: list[Path], tokens: int | None = None, device: str = "auto") -> None:
    """Write eval.json of finished checkpoints anew, on the held-out documents of the text they were trained on.

    Args:
        tokens: held-out tokens; default as many as when each was trained.

    Raises:
        ValueError: a checkpoint, its model or its text cannot be used.
    """
    for group in by_origin([Checkpoint(path) for path in paths]):
        saes = [each.sae for each in group]
        lm = group[0].open_model(pick_device(device))
        corpus = group[0].open_text(lm.tokenizer)
        trained = [each.config.options.training for each in group if each.config.options] or [TrainingConfig()]
        n_tokens = tokens or min(each.eval_tokens for each in trained)
        held_out = corpus.held_out(-(-n_tokens // (corpus.context_size - 1)))
        results = evaluate(lm.layer(group[0].layer), saes, held_out, trained[0].seed, progress=True)
        for each, result in zip(group, results, strict=True):
            write_json(each.path / "eval.json", result)


def repeated_tokens(lm: LanguageModel, n: int, half: int, seed: int) -> Int[Tensor, "n pos"]:
    """BOS, then `half` random tokens, then the same again: text on which induction heads matter."""
    special = torch.tensor(lm.tokenizer.all_special_ids)
    ordinary = torch.arange(lm.d_vocab)
    ordinary = ordinary[~torch.isin(ordinary, special)]
    generator = torch.Generator().manual_seed(seed)
    first = ordinary[torch.randint(len(ordinary), (n, half), generator=generator)]
    bos = torch.full((n, 1), lm.tokenizer.bos_token_id)
    return torch.cat([bos, first, first], dim=1)


def evaluate_tokens(
    layer: Layer,
    saes: list[BlockDiagSAE],
    tokens: Int[Tensor, "context pos"],
    first_scored: int,
    per_head: bool = True,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Metrics of each SAE on given contexts, scored at positions `first_scored` and later.

    z is replaced at every position but BOS, also before `first_scored`. CE and KL are scored where
    the next token is known.

    Args:
        per_head: also measure CE and KL with one head replaced at a time, on the first batches that hold 2,048
            scored tokens.
    """
    saes = [sae.to(layer.device) for sae in saes]
    chunks = tokens.to(layer.device).split(max(1, _BATCH_TOKENS // tokens.shape[1]))
    # Residual stream and z of the whole text are kept, so that the layers before the hook run once.
    prefixes = [layer.prefix(chunk) for chunk in chunks]
    scored = torch.cat([z[:, first_scored:].flatten(0, 1) for _, z in prefixes])
    mean = scored.double().mean(0).to(scored.dtype)
    results = [_reconstruction(sae, scored, mean) for sae in saes]

    effects: dict[tuple, list[Effect]] = {}
    heads = list(range(layer.n_heads)) if per_head else []
    chunked = list(zip(chunks, prefixes, strict=True))
    done = 0
    for chunk, (resid, z) in tqdm(chunked, desc="Evaluating", disable=not progress, dynamic_ncols=True):
        score = _Scorer(layer, chunk, resid, first_scored)
        heads_now = heads if done < _PER_HEAD_TOKENS else []
        done += len(score.targets)
        replacements = {("zero",): torch.zeros_like(z), ("mean",): mean.expand_as(z)}
        replacements |= {("sae", index): sae(z.float()).to(z.dtype) for index, sae in enumerate(saes)}
        effects.setdefault(("clean",), []).append(Effect(score.clean_ce, torch.zeros_like(score.clean_ce)))
        for name, replacement in replacements.items():
            spliced = torch.cat([z[:, :1], replacement[:, 1:]], dim=1)
            effects.setdefault(name, []).append(score(spliced))
            for head in heads_now if name != ("mean",) else []:
                one = z.clone()
                one[:, :, head] = spliced[:, :, head]
                effects.setdefault((*name, "head", head), []).append(score(one))

    joined = {name: Effect(*map(torch.cat, zip(*parts, strict=True))) for name, parts in effects.items()}
    for index, result in enumerate(results):
        result |= _prediction(joined, index, heads)
    return results


class _Scorer:
    """Scores replacements of z on one batch against the clean run."""

    def __init__(self, layer: Layer, tokens: Tensor, resid: Tensor, first_scored: int) -> None:
        self.layer, self.resid = layer, resid
        self.scored = slice(first_scored, tokens.shape[1] - 1)
        self.targets = tokens[:, first_scored + 1 :].flatten()
        self.clean = self._log_probs(None)
        self.clean_ce = F.nll_loss(self.clean, self.targets, reduction="none")

    def __call__(self, z: Float[Tensor, "batch pos head d_head"]) -> Effect:
        log_probs = self._log_probs(z)
        kl = F.kl_div(log_probs, self.clean, log_target=True, reduction="none").sum(-1)
        return Effect(F.nll_loss(log_probs, self.targets, reduction="none"), kl)

    def _log_probs(self, z: Tensor | None) -> Float[Tensor, "token d_vocab"]:
        logits = self.layer.logits(self.resid, z)[:, self.scored]
        return logits.flatten(0, 1).float().log_softmax(-1)


@torch.no_grad()
def _reconstruction(
    sae: BlockDiagSAE, z: Float[Tensor, "token head d_head"], mean: Float[Tensor, "head d_head"]
) -> dict[str, Any]:
    """Sparsity and squared error over tokens; z is raw hook_z."""
    n_heads = z.shape[1]
    error, deviation = torch.zeros(2, n_heads, dtype=torch.float64, device=z.device)
    fired = torch.zeros(sae.n_blocks, sae.features_per_block, dtype=torch.int64, device=z.device)
    histogram = torch.zeros(sae.n_blocks, sae.features_per_block + 1, dtype=torch.int64, device=z.device)
    for part in z.split(_BATCH_TOKENS):
        part = part.float()
        f = sae.encode(part)
        error += (sae.decode(f).reshape(part.shape) - part).pow(2).sum(-1).double().sum(0)
        deviation += (part - mean).pow(2).sum(-1).double().sum(0)
        active = f > 0
        fired += active.sum(0)
        histogram.scatter_add_(1, active.sum(-1).T, torch.ones_like(active[..., 0].T, dtype=torch.int64))
    dead = (fired == 0).double().mean(-1)
    l0 = fired.sum(-1).double() / len(z)
    longest = int(histogram.sum(0).nonzero().max()) + 1
    return {
        "n_tokens": len(z),
        "L0": l0.sum().item(),
        "L0_per_head": l0.tolist(),
        "L0_histogram_per_head": histogram[:, :longest].tolist(),
        "MSE": (error.sum() / len(z)).item(),
        "MSE_per_head": (error / len(z)).tolist(),
        "FVU": (error.sum() / deviation.sum()).item(),
        "FVU_per_head": (error / deviation).tolist(),
        "dead_fraction": dead.mean().item(),
        "dead_fraction_per_head": dead.tolist(),
    }


def _prediction(effects: dict[tuple, Effect], index: int, heads: list[int]) -> dict[str, Any]:
    """CE and KL figures of the `index`-th SAE, each with its standard error."""
    clean, zero, sae = effects[("clean",)], effects[("zero",)], effects[("sae", index)]
    mean = effects[("mean",)]
    figures = {"CE_clean": clean.ce.double().mean().item(), "CE_clean_se": _standard_error(clean.ce)}
    for name, effect in (("sae", sae), ("zero", zero), ("mean", mean)):
        figures[f"CE_{name}"] = effect.ce.double().mean().item()
        figures[f"CE_{name}_se"] = _standard_error(effect.ce - clean.ce)  # paired: texts differ more than models
    for name, effect in (("sae", sae), ("zero", zero)):
        figures[f"KL_{name}"] = effect.kl.double().mean().item()
        figures[f"KL_{name}_se"] = _standard_error(effect.kl)
    figures["CE_score"], figures["CE_score_se"] = _score(sae.ce - clean.ce, zero.ce - clean.ce)
    figures["KL_score"], figures["KL_score_se"] = _score(sae.kl, zero.kl)
    if heads:
        pairs = [(effects[("sae", index, "head", head)], effects[("zero", "head", head)]) for head in heads]
        ce_clean = clean.ce[: len(pairs[0][0].ce)]
        figures["n_tokens_per_head"] = len(ce_clean)
        figures["KL_sae_per_head"] = [s.kl.double().mean().item() for s, _ in pairs]
        figures["KL_zero_per_head"] = [z.kl.double().mean().item() for _, z in pairs]
        ce = [_score(s.ce - ce_clean, z.ce - ce_clean) for s, z in pairs]
        kl = [_score(s.kl, z.kl) for s, z in pairs]
        for name, scores in (("CE", ce), ("KL", kl)):
            figures[f"{name}_score_per_head"] = [score for score, _ in scores]
            figures[f"{name}_score_per_head_se"] = [se for _, se in scores]
    return figures


def _score(damage: Float[Tensor, " token"], ablation: Float[Tensor, " token"]) -> tuple[float | None, float | None]:
    """1 - mean(damage) / mean(ablation) and its standard error by the delta method, paired per token.

    (None, None), "not measurable on this text", where ablation is within 3 standard errors of 0.
    """
    damage, ablation = damage.double(), ablation.double()
    denominator = ablation.mean().item()
    if not abs(denominator) > 3 * _standard_error(ablation):
        return None, None
    ratio = damage.mean().item() / denominator
    return 1 - ratio, _standard_error(damage - ratio * ablation) / abs(denominator)


def _standard_error(values: Float[Tensor, " token"]) -> float:
    return (values.double().std() / len(values) ** 0.5).item()


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description="Write eval.json anew.")
    parser.add_argument("checkpoints", nargs="+", type=Path, help="checkpoint directories")
    parser.add_argument("--tokens", type=int, help="held-out tokens; default as many as when they were trained")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    options = parser.parse_args(argv)
    return cli.status(lambda: evaluate_checkpoints(options.checkpoints, options.tokens, options.device), "Stopped.")


if __name__ == "__main__":
    sys.exit(main())
