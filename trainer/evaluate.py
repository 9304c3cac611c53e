"""Held-out metrics: what an SAE keeps of the activations, and of the model's predictions.

Every metric leaves the BOS position out: it is not reconstructed, not replaced and not scored.
docs/metrics.md has the definitions; several SAEs of one layer share every forward that does not
depend on them, so they are evaluated on the same tokens by construction.

    python -m trainer.evaluate checkpoints/<name> ... [--tokens N]     writes eval.json anew
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer import cli, ranks
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint, by_origin
from trainer.effects import MEASURABLE, Effects, effects, split
from trainer.files import cache_dir, make_writable, write_json
from trainer.model.lm import LanguageModel, Layer, pick_device
from trainer.sharing.pull import located

_ENCODED_TOKENS = 1024  # at a time
_CONSTANT = 1e-12  # of its squared norm: less variance is rounding


def evaluate(
    layer: Layer,
    saes: list[BlockDiagSAE],
    held_out: Int[Tensor, "context pos"],
    seed: int,
    cache: Path | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """The contents of eval.json for each SAE.

    Args:
        layer: of the model that the SAEs were trained on.
        saes: for its raw hook_z.
        held_out: contexts beginning with BOS.
        seed: of the repeated random tokens.
        cache: folder for what no SAE changes (`kept_effects`); None keeps nothing.
    """
    half = (held_out.shape[1] - 1) // 2
    repeated = repeated_tokens(layer.lm, len(held_out), half, seed)
    on_text = evaluate_tokens(layer, saes, held_out, 1, cache=cache, progress=progress)
    on_repeats = evaluate_tokens(layer, saes, repeated, 1 + half, cache=cache, progress=progress)
    return [{**text, "induction": induction} for text, induction in zip(on_text, on_repeats, strict=True)]


def evaluate_checkpoints(
    paths: list[Path],
    tokens: int | None = None,
    device: str = "auto",
    model: str | None = None,
    text: str | None = None,
) -> None:
    """Write eval.json of finished checkpoints anew, on the held-out documents of the text they were trained on.

    Under torchrun the processes share the model's runs, and the first one writes.

    Args:
        tokens: held-out tokens; default as many as eval.json has, else `default_tokens`.
        model, text: where they lie now, if elsewhere than in training.

    Raises:
        ValueError: a checkpoint, its model or its text cannot be used.
    """
    with ranks.joined():
        _evaluate_checkpoints(paths, tokens, device, model, text)


def _evaluate_checkpoints(
    paths: list[Path], tokens: int | None, device: str, model: str | None, text: str | None
) -> None:
    checkpoints = [Checkpoint(path) for path in paths]
    if ranks.is_first():
        for path in paths:
            make_writable(path)
    for group in by_origin(checkpoints, model):
        saes = [each.sae for each in group]
        lm = group[0].open_model(ranks.own_device(pick_device(device)), model)
        corpus = group[0].open_text(lm.tokenizer, text)
        before = [each.eval["n_tokens"] for each in group if each.eval]
        n_tokens = tokens or min(before, default=default_tokens(str(lm.device)))
        held_out = corpus.held_out(corpus.n_contexts(n_tokens))
        options = group[0].config.options
        seed = options.training.seed if options else 0
        results = evaluate(lm.layer(group[0].layer), saes, held_out, seed, kept_effects(), progress=True)
        for each, result in zip(group, results, strict=True):
            if ranks.is_first():
                write_json(each.path / "eval.json", result)


def default_tokens(device: str) -> int:
    """Held-out tokens of an evaluation where nobody says how many: fewer on a CPU, where they take longest."""
    return 1500 if device == "cpu" else 8192


def kept_effects() -> Path:
    """Folder for what an evaluation computes that no SAE changes, beside the activations."""
    return cache_dir() / "effects"


def repeated_tokens(lm: LanguageModel, n: int, half: int, seed: int) -> Int[Tensor, "n pos"]:
    """BOS, then `half` random tokens, then the same again: text on which induction heads matter."""
    special = torch.tensor(lm.tokenizer.all_special_ids)
    ordinary = torch.arange(min(lm.d_vocab, len(lm.tokenizer)))  # an unembedding may have rows that are no token
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
    cache: Path | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Metrics of each SAE on given contexts, scored at positions `first_scored` and later.

    z is replaced at every position but BOS, also before `first_scored`. CE and KL are scored where
    the next token is known.

    Args:
        per_head: also measure CE and KL with one head replaced at a time, on fewer tokens (`effects`).
    """
    saes = [sae.to(layer.device) for sae in saes]
    tokens = tokens.to(layer.device)
    # Residual stream and z of the whole text are kept, so that the layers before the hook run once.
    prefixes = [layer.prefix(chunk) for chunk in split(tokens)]
    scored = torch.cat([z[:, first_scored:].flatten(0, 1) for _, z in prefixes])
    mean = scored.double().mean(0).to(scored.dtype)
    results = [_reconstruction(sae, scored, mean) for sae in saes]
    of_text = effects(layer, tokens, prefixes, mean, saes, first_scored, per_head, cache, progress)
    return [result | _prediction(of_text, index) for index, result in enumerate(results)]


@torch.no_grad()
def _reconstruction(
    sae: BlockDiagSAE, z: Float[Tensor, "token head d_head"], mean: Float[Tensor, "head d_head"]
) -> dict[str, Any]:
    """Sparsity and squared error over tokens; z is raw hook_z."""
    n_heads = z.shape[1]
    error, deviation, square = torch.zeros(3, n_heads, dtype=torch.float64, device=z.device)
    fired = torch.zeros(sae.n_blocks, sae.features_per_block, dtype=torch.int64, device=z.device)
    histogram = torch.zeros(sae.n_blocks, sae.features_per_block + 1, dtype=torch.int64, device=z.device)
    for part in z.split(_ENCODED_TOKENS):
        part = part.float()
        f = sae.encode(part)
        error += (sae.decode(f).reshape(part.shape) - part).pow(2).sum(-1).double().sum(0)
        deviation += (part - mean).pow(2).sum(-1).double().sum(0)
        square += part.pow(2).sum(-1).double().sum(0)
        active = f > 0
        fired += active.sum(0)
        histogram.scatter_add_(1, active.sum(-1).T, torch.ones_like(active[..., 0].T, dtype=torch.int64))
    dead = (fired == 0).double().mean(-1)
    l0 = fired.sum(-1).double() / len(z)
    fvu_per_head = (error / deviation).where(deviation > _CONSTANT * square, torch.nan)  # of a constant head: none
    longest = int(histogram.sum(0).nonzero().max()) + 1
    return {
        "n_tokens": len(z),
        "L0": l0.sum().item(),
        "L0_per_head": l0.tolist(),
        "L0_histogram_per_head": histogram[:, :longest].tolist(),
        "MSE": (error.sum() / len(z)).item(),
        "MSE_per_head": (error / len(z)).tolist(),
        "FVU": (error.sum() / deviation.sum()).item(),
        "FVU_per_head": [fvu if fvu == fvu else None for fvu in fvu_per_head.tolist()],
        "dead_fraction": dead.mean().item(),
        "dead_fraction_per_head": dead.tolist(),
    }


def _prediction(of_text: Effects, index: int) -> dict[str, Any]:
    """CE and KL figures of the `index`-th SAE, each with its standard error."""
    clean, zero, mean = of_text.clean, of_text.zero, of_text.mean
    ce, kl = (each[index] for each in of_text.saes)
    figures: dict[str, Any] = {"CE_clean": clean.double().mean().item(), "CE_clean_se": _standard_error(clean)}
    for name, loss in (("sae", ce), ("zero", zero.ce), ("mean", mean.ce)):
        figures[f"CE_{name}"] = loss.double().mean().item()
        figures[f"CE_{name}_se"] = _standard_error(loss - clean)  # paired: texts differ more than models
    for name, divergence in (("sae", kl), ("zero", zero.kl)):
        figures[f"KL_{name}"] = divergence.double().mean().item()
        figures[f"KL_{name}_se"] = _standard_error(divergence)
    figures["CE_score"], figures["CE_score_se"] = _score(ce - clean, zero.ce - clean)
    figures["KL_score"], figures["KL_score_se"] = _score(kl, zero.kl)
    if not of_text.zero_heads.ce.numel():
        return figures
    (ce, kl), zero = (each[index] for each in of_text.sae_heads), of_text.zero_heads
    clean = clean[: ce.shape[1]]
    figures["n_tokens_per_head"] = len(clean)
    figures["KL_sae_per_head"] = kl.double().mean(1).tolist()
    figures["KL_zero_per_head"] = zero.kl.double().mean(1).tolist()
    for name, pairs in (("CE", zip(ce - clean, zero.ce - clean, strict=True)), ("KL", zip(kl, zero.kl, strict=True))):
        scores = [_score(*pair) for pair in pairs]
        figures[f"{name}_score_per_head"] = [score for score, _ in scores]
        figures[f"{name}_score_per_head_se"] = [se for _, se in scores]
    return figures


def _score(damage: Float[Tensor, " token"], ablation: Float[Tensor, " token"]) -> tuple[float | None, float | None]:
    """1 - mean(damage) / mean(ablation) and its standard error by the delta method, paired per token.

    (None, None), "not measurable on this text", where ablation is within MEASURABLE standard errors of 0.
    """
    damage, ablation = damage.double(), ablation.double()
    denominator = ablation.mean().item()
    if not abs(denominator) > MEASURABLE * _standard_error(ablation):
        return None, None
    ratio = damage.mean().item() / denominator
    return 1 - ratio, _standard_error(damage - ratio * ablation) / abs(denominator)


def _standard_error(values: Float[Tensor, " token"]) -> float:
    return (values.double().std() / len(values) ** 0.5).item()


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description="Write eval.json anew.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help=cli.CHECKPOINT)
    parser.add_argument("--tokens", type=int, help="held-out tokens; default as many as eval.json has")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    cli.add_places(parser)
    options = parser.parse_args(argv)
    how = (options.tokens, options.device, options.model, options.text)

    def run() -> None:
        evaluate_checkpoints([located(path) for path in options.checkpoints], *how)

    return cli.status(run, "Stopped.", many_processes=True)


if __name__ == "__main__":
    sys.exit(main())
