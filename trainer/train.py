"""The training loop: one stream of activations, one SAE per sparsity coefficient."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from trainer import checkpoint, embedded
from trainer.block_diag import BlockDiagSAE
from trainer.buffer import CachedActivations, batches, open_source
from trainer.config import ActivationsConfig, SAEConfig, TrainingConfig
from trainer.evaluate import evaluate
from trainer.lm import PROCESSING, LanguageModel
from trainer.run import Run
from trainer.text import EMBEDDED, Corpus

_SCALE_ROWS = 32_768  # rows from which the input scale and the decoder bias are estimated
_NOT_COMPARED = {"resume", "out", "device", "wandb", "wandb_project", "log_every", "save_every", "l1_coefficients"}


class Interrupted(Exception):
    """The run was stopped; everything needed to resume it is saved."""


def train(activations: ActivationsConfig, sae_cfg: SAEConfig, cfg: TrainingConfig) -> list[Path]:
    """Train one SAE per coefficient and evaluate them; returns their checkpoint directories.

    Raises:
        ValueError: the model, layer, text or an existing directory does not allow the run.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    device = _device(cfg.device)
    runs = _prepare_directories(activations, sae_cfg, cfg)
    print(f"Loading {activations.model} on {device}", flush=True)
    lm = LanguageModel.load(activations.model, device, activations.model_dtype)
    lm.check_layer(activations.hook_layer)
    corpus = Corpus(
        _dataset(activations),
        lm.tokenizer,
        _context_size(activations, lm),
        activations.held_out_fraction,
        activations.text_column,
    )
    n_tokens = cfg.total_training_steps * cfg.batch_size
    print(f"Text: {corpus.describe()}", flush=True)
    held_out = corpus.held_out(-(-cfg.eval_tokens // (corpus.context_size - 1)))  # refuse before hours of work

    source = open_source(lm, activations, corpus, n_tokens, cfg.buffer_tokens, cfg.seed)
    distinct = source.distinct_tokens
    print(f"The run reads {n_tokens:,} tokens: {distinct:,} distinct ones, {n_tokens / distinct:.1f} times", flush=True)
    if isinstance(source, CachedActivations):
        _fill(source, lm, activations.hook_layer, corpus)
    scale, mean = _statistics(batches(source, cfg.batch_size, cfg.seed), sae_cfg.normalize)
    data = _describe_data(lm, activations, corpus)
    for run in runs:
        run.description |= data
        sae = _new_sae(lm, sae_cfg)
        sae.initialise(sae.blocks(mean * scale), torch.Generator().manual_seed(cfg.seed))
        run.start(sae.to(device), sae.blocks(scale).to(device))

    _loop(runs, source, cfg, device)
    print(f"Evaluating on {cfg.eval_tokens:,} held-out tokens and as many repeated random tokens", flush=True)
    results = evaluate(lm, activations.hook_layer, [run.folded() for run in runs], held_out, cfg.seed, progress=True)
    for run, result in zip(runs, results, strict=True):
        checkpoint.write_json(run.path / "eval.json", result)
        run.save("complete")
        run.log.finish(result)
        score = "not measurable" if result["KL_score"] is None else f"{result['KL_score']:.3f}"
        print(f"{run.path}: L0 {result['L0']:.1f}, FVU {result['FVU']:.3f}, KL score {score}")
    return [run.path for run in runs]


def _loop(runs: list[Run], source: Any, cfg: TrainingConfig, device: str) -> None:
    first, total = min(run.step for run in runs), cfg.total_training_steps
    stream = batches(source, cfg.batch_size, cfg.seed, start=first)
    bar = tqdm(total=total, initial=first, unit="step", desc="Training", dynamic_ncols=True)
    with bar, _deferred_interrupts() as asked_to_stop:
        for step in range(first, total):
            z = next(stream).to(device)
            for run in runs:
                if run.step == step:  # a run that was saved later than the others waits for them
                    run.update(z)
            bar.update()
            bar.set_postfix_str(" | ".join(_progress(run.latest) for run in runs if run.latest), refresh=False)
            # Saved after the last step too: the evaluation may yet be interrupted.
            if (step + 1) % cfg.save_every == 0 or step + 1 == total or asked_to_stop():
                for run in runs:
                    run.save("training")
            if asked_to_stop():
                raise Interrupted(f"stopped at step {step + 1:,}; the same command with --resume=true goes on")


@contextmanager
def _deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C and SIGTERM wait for the end of the step: a save never holds half of one.

    Yields a function that says whether one came. A second one does not wait.
    """
    asked: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield lambda: False
        return
    previous = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def _progress(line: dict[str, Any]) -> str:
    return f"loss {line['loss']:.1f} L0 {line['L0']:.1f} FVU {line['FVU']:.3f} {line['tokens_per_second']:,.0f} tok/s"


def _prepare_directories(activations: ActivationsConfig, sae_cfg: SAEConfig, cfg: TrainingConfig) -> list[Run]:
    """Decide each run's directory before anything is computed, and refuse to overwrite one."""
    dense = "" if sae_cfg.block == "head" else "-dense"
    base = (
        f"{Path(activations.model).name}-L{activations.hook_layer}-{sae_cfg.recipe}{dense}-x{sae_cfg.expansion_factor}"
    )
    settings = {**asdict(activations), **asdict(sae_cfg), **asdict(cfg)}
    runs = []
    for coefficient in sae_cfg.l1_coefficients:
        suffix = f"-l1_{coefficient:g}"
        single = cfg.name and len(sae_cfg.l1_coefficients) == 1
        path = Path(cfg.out) / (cfg.name if single else f"{cfg.name or base}{suffix}")
        description = {
            "recipe": sae_cfg.recipe,
            "block": sae_cfg.block,
            "l1_coefficient": coefficient,
            "seed": cfg.seed,
            "group": cfg.name or base,
            "training": settings,
        }
        _check_directory(path, settings, cfg.resume)
        runs.append(Run(path, coefficient, description, cfg))
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        probe = Path(cfg.out) / ".write-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"checkpoints cannot be written to {cfg.out}: {error.strerror}") from error
    return runs


def _check_directory(path: Path, settings: dict[str, Any], resume: bool) -> None:
    if not path.exists():
        return
    if not resume:
        raise ValueError(f"{path} exists already: choose another --name or --out, or continue it with --resume=true")
    config = checkpoint.load_config(path)
    if config["status"] == "complete":
        raise ValueError(f"{path} is complete: there is nothing to resume")
    for key, value in settings.items():
        before = config["training"].get(key)
        if key not in _NOT_COMPARED and before != value:
            raise ValueError(
                f"{path} was begun with {key}={before}, not {value}: resume it with the same configuration"
            )


def _dataset(activations: ActivationsConfig) -> str:
    if activations.dataset:
        return activations.dataset
    return EMBEDDED if activations.model == embedded.NAME else "Skylion007/openwebtext"


def _context_size(activations: ActivationsConfig, lm: LanguageModel) -> int:
    size = activations.context_size or (128 if _dataset(activations) == EMBEDDED else min(1024, lm.n_ctx))
    if size > lm.n_ctx:
        raise ValueError(f"context_size {size} exceeds the {lm.n_ctx} positions of {lm.name}")
    return size


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by backend
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def _fill(source: CachedActivations, lm: LanguageModel, layer: int, corpus: Corpus) -> None:
    if not source.missing():
        print(f"Activations: from the cache {source.folder}", flush=True)
        return
    with tqdm(unit="tok", unit_scale=True, desc="Harvesting activations", dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        source.fill(lm, layer, corpus, progress)


def _statistics(stream: Any, normalize: str) -> tuple[Float[Tensor, "head d_head"], Float[Tensor, "head d_head"]]:
    """Scale of every input dimension, and the mean of raw z, from the first rows of the stream."""
    rows = []
    while sum(map(len, rows)) < _SCALE_ROWS:
        rows.append(next(stream))
    z = torch.cat(rows)[:_SCALE_ROWS]
    n_heads, d_head = z.shape[1:]
    if normalize == "per_head":
        scale = d_head**0.5 / z.norm(dim=-1).mean(0).clamp_min(1e-6)
    elif normalize == "global":
        scale = ((n_heads * d_head) ** 0.5 / z.flatten(1).norm(dim=-1).mean()).expand(n_heads)
    else:
        scale = torch.ones(n_heads)
    return scale[:, None].expand(n_heads, d_head).contiguous(), z.mean(0)


def _new_sae(lm: LanguageModel, sae_cfg: SAEConfig) -> BlockDiagSAE:
    n_blocks, width = (lm.n_heads, lm.d_head) if sae_cfg.block == "head" else (1, lm.n_heads * lm.d_head)
    return BlockDiagSAE(n_blocks, width, width * sae_cfg.expansion_factor)


def _describe_data(lm: LanguageModel, activations: ActivationsConfig, corpus: Corpus) -> dict[str, Any]:
    return {
        "model": {
            "name": lm.name,
            "fingerprint": lm.fingerprint(),
            "hook_name": activations.hook_name,
            "hook_layer": activations.hook_layer,
            "n_heads": lm.n_heads,
            "d_head": lm.d_head,
            "dtype": activations.model_dtype,
            "processing": PROCESSING,
        },
        "text": {
            "name": corpus.name,
            "fingerprint": corpus.fingerprint,
            "context_size": corpus.context_size,
            "held_out_fraction": activations.held_out_fraction,
            "text_column": activations.text_column,
        },
    }
