"""Held-out metrics: what an SAE keeps of the activations, and of the model's predictions.

Every metric leaves the BOS position out: it is not reconstructed, not replaced and not scored.
docs/metrics.md has the definitions; several SAEs of one layer share every forward that does not
depend on them, so they are evaluated on the same tokens by construction.

    python -m trainer.evaluate checkpoints/<name> ... [--tokens N]     writes eval.json anew
"""

import argparse
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from trainer import cli, ranks, scores
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint, by_origin
from trainer.effects import effects, split
from trainer.figures import SCHEMA_VERSION
from trainer.files import cache_dir, make_writable, write_json
from trainer.model.lm import LanguageModel, Layer, pick_device
from trainer.sharing.pull import located


def evaluate(
    layer: Layer,
    saes: list[BlockDiagSAE],
    held_out: Int[Tensor, "context pos"],
    n_documents: int,
    seed: int,
    cache: Path | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """The contents of eval.json for each SAE.

    Args:
        layer: of the model that the SAEs were trained on.
        saes: for its raw hook_z.
        held_out: contexts beginning with BOS.
        n_documents: that these are of.
        seed: of the repeated random tokens.
        cache: folder for what no SAE changes (`kept_effects`); None keeps nothing.
    """
    half = (held_out.shape[1] - 1) // 2
    repeated = repeated_tokens(layer.lm, len(held_out), half, seed)
    on_text = evaluate_tokens(layer, saes, held_out, 1, cache=cache, progress=progress)
    on_repeats = evaluate_tokens(layer, saes, repeated, 1 + half, cache=cache, progress=progress)
    about = {"schema_version": SCHEMA_VERSION, "n_documents": n_documents}
    return [{**about, **text, "induction": induction} for text, induction in zip(on_text, on_repeats, strict=True)]


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
        lm = group[0].open_model(ranks.own_device(pick_device(device)), model)
        corpus = group[0].open_text(lm.tokenizer, text)
        for layer, of_layer in groupby(group, key=lambda each: each.layer):
            same = list(of_layer)
            before = [each.eval["n_tokens"] for each in same if each.eval]
            n_tokens = tokens or min(before, default=default_tokens(str(lm.device)))
            held_out = corpus.held_out(corpus.n_contexts(n_tokens))
            options = same[0].config.options
            seed, saes = options.training.seed if options else 0, [each.sae for each in same]
            n_documents = corpus.n_documents(held_out)
            results = evaluate(lm.layer(layer), saes, held_out, n_documents, seed, kept_effects(), progress=True)
            for each, result in zip(same, results, strict=True):
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
    scored = torch.cat([z[:, first_scored:] for _, z in prefixes])
    mean = scored.double().mean((0, 1)).to(scored.dtype)
    size = {"n_tokens": scored[..., 0, 0].numel(), "n_contexts": len(scored)}
    results = [size | scores.reconstruction(sae, scored, mean) for sae in saes]
    of_text = effects(layer, tokens, prefixes, mean, saes, first_scored, per_head, cache, progress)
    return [result | scores.prediction(of_text, index) for index, result in enumerate(results)]


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
