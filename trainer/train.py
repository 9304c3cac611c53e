"""The training loop: one stream of activations, any number of SAEs."""

import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from trainer import checkpoint, embedded
from trainer.config import ActivationsConfig, TrainingConfig
from trainer.data.buffer import CachedActivations, Source, batches, batches_in, open_source
from trainer.data.text import EMBEDDED, Corpus
from trainer.evaluate import evaluate, evaluate_tokens
from trainer.interrupts import Interrupted, deferred_interrupts
from trainer.model.lm import PROCESSING, LanguageModel, pick_device
from trainer.optimise.initialise import initial_params, input_scale
from trainer.optimise.stack import Stack
from trainer.recipes import SAEConfig
from trainer.run import Run, plan

_STATISTICS_ROWS = 32_768  # rows from which the input scale and the biases are estimated
_SHORT_EVAL_TOKENS = 2048


def train(activations: ActivationsConfig, saes: list[SAEConfig], cfg: TrainingConfig) -> list[Path]:
    """Train SAEs on one stream of activations and evaluate them; returns their checkpoint directories.

    Raises:
        ValueError: the model, layer, text or an existing directory does not allow the run.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    device = pick_device(cfg.device)
    runs = plan(activations, saes, cfg)
    layers = sorted({run.sae.hook_layer for run in runs})
    print(f"Loading {activations.model} on {device}", flush=True)
    lm = LanguageModel.load(activations.model, device, activations.model_dtype)
    for layer in layers:
        lm.check_layer(layer)
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

    _check_k(runs, lm)

    source = open_source(lm, activations, layers, corpus, n_tokens, cfg.buffer_tokens, cfg.seed)
    batches_in(source, 0, cfg.batch_size)
    data = _describe_data(lm, activations, corpus, source)
    for run in runs:
        run.describe(data(run.sae.hook_layer))
    step = max(set.intersection(*(run.saved_steps() for run in runs)), default=0)
    if step < cfg.total_training_steps:
        distinct = source.distinct_tokens
        times = f"{distinct:,} distinct ones, {n_tokens / distinct:.1f} times"
        print(f"The run reads {n_tokens:,} tokens: {times}", flush=True)
        if isinstance(source, CachedActivations):
            _fill(source, lm, corpus)
    stream = batches(source, cfg.batch_size, cfg.seed, step, device)
    if step:
        stacks = [(_continued(group, step, cfg, device), group) for group in _groups(runs)]
    else:  # the first batches are also the data from which the SAEs start
        n_first = min(-(-_STATISTICS_ROWS // cfg.batch_size), cfg.total_training_steps)
        first = [next(stream) for _ in range(n_first)]
        rows = torch.cat(first)[:_STATISTICS_ROWS].cpu()
        stacks = [
            (_fresh(group, rows[:, layers.index(group[0].sae.hook_layer)], cfg, device), group)
            for group in _groups(runs)
        ]
        stream = chain(first, stream)
        del first, rows
    for stack, group in stacks:
        for point, run in enumerate(group):
            run.begin(step, stack.finished(point))
    _loop(stacks, layers, stream, step, cfg, lm, held_out)
    del stream

    print(f"Evaluating on {cfg.eval_tokens:,} held-out tokens and as many repeated random tokens", flush=True)
    for layer in layers:
        of_layer = [(r, _for_use(s, i, cfg)) for s, rs in stacks for i, r in enumerate(rs) if r.sae.hook_layer == layer]
        results = evaluate(lm, layer, [sae.float() for _, sae in of_layer], held_out, cfg.seed, progress=True)
        for (run, sae), result in zip(of_layer, results, strict=True):
            checkpoint.write_json(run.path / "eval.json", result)
            run.save(sae.to(getattr(torch, cfg.weights_dtype)), cfg.total_training_steps, "complete")
            if not cfg.keep_training_state:
                run.drop_states(keep=None)
            run.log.finish(result)
            score = "not measurable" if result["KL_score"] is None else f"{result['KL_score']:.3f}"
            print(f"{run.path}: L0 {result['L0']:.1f}, FVU {result['FVU']:.3f}, KL score {score}")
    return [run.path for run in runs]


def _groups(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ only in their sparsity are trained as one stack."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.sae.all_but_sparsity(), []).append(run)
    return list(groups.values())


def _fresh(runs: list[Run], z: Float[Tensor, "row head d_head"], cfg: TrainingConfig, device: str) -> Stack:
    """A stack before its first step."""
    sae = runs[0].sae
    scale = input_scale(z, sae.normalize)
    if sae.block == "dense":
        scale = scale.view(1, -1)
    n_features = scale.shape[1] * sae.expansion_factor
    x = z.reshape(len(z), *scale.shape) * scale
    # The points start equal: their sparsity is no part of the initialisation.
    params = initial_params(sae, x, n_features, torch.Generator().manual_seed(cfg.seed))
    return Stack([run.sae for run in runs], [params] * len(runs), scale.to(device), cfg)


def _continued(runs: list[Run], step: int, cfg: TrainingConfig, device: str) -> Stack:
    """A stack as it was saved after `step` steps."""
    states = [run.load_state(step) for run in runs]
    params = [{name: state[name] for name in state if f"adam.exp_avg.{name}" in state} for state in states]
    stack = Stack([run.sae for run in runs], params, states[0]["scale"].to(device), cfg)
    stack.load_states(step, states)
    return stack


def _check_k(runs: list[Run], lm: LanguageModel) -> None:
    for run in runs:
        per_head = lm.d_head * run.sae.expansion_factor
        available = per_head * (1 if run.sae.block == "head" and run.sae.k_scope == "head" else lm.n_heads)
        if run.sae.k and run.sae.k > available:
            raise ValueError(f"k must lie between 1 and {available:,}, the features to choose from; got {run.sae.k}")


def _loop(
    stacks: list[tuple[Stack, list[Run]]],
    layers: list[int],
    stream: Iterator[Tensor],
    first: int,
    cfg: TrainingConfig,
    lm: LanguageModel,
    held_out: Tensor,
) -> None:
    total = cfg.total_training_steps
    bar = tqdm(total=total, initial=first, unit="step", desc="Training", dynamic_ncols=True)
    since, waited, logged = time.perf_counter(), 0.0, first
    with bar, deferred_interrupts() as asked_to_stop:
        for step in range(first + 1, total + 1):
            asked = time.perf_counter()
            z = next(stream)
            waited += time.perf_counter() - asked
            done = [stack.update(z[:, layers.index(stack.cfg.hook_layer)]) for stack, _ in stacks]
            bar.update()
            evaluates = cfg.eval_every and step % cfg.eval_every == 0 and step < total
            if step % cfg.log_every == 0 or step == total or evaluates:
                elapsed = time.perf_counter() - since
                speed = {
                    "tokens_per_second": (step - logged) * len(z) / elapsed,
                    "activations_share": waited / elapsed,
                }
                held = _short_evaluation(lm, stacks, held_out) if evaluates else {}
                for (stack, runs), batch in zip(stacks, done, strict=True):
                    for point, run in enumerate(runs):
                        figures, histograms = stack.figures(point, batch)
                        if not all(torch.isfinite(torch.tensor(figures[key])) for key in ("loss", "grad_norm")):
                            raise ValueError(f"the loss of {run.path.name} is not finite at step {step}: lower lr")
                        run.record(step, figures | speed | held.get(run.path, {}), histograms)
                bar.set_postfix_str(_progress([run.latest for _, runs in stacks for run in runs]), refresh=False)
                since, waited, logged = time.perf_counter(), 0.0, step
            # Saved after the last step too: the evaluation may yet be interrupted.
            stopping = asked_to_stop()
            if step % cfg.save_every == 0 or step == total or stopping:
                _save(stacks, step, cfg)
            if stopping:
                raise Interrupted(f"stopped at step {step:,}; the same command with --resume=true goes on")


def _save(stacks: list[tuple[Stack, list[Run]]], step: int, cfg: TrainingConfig) -> None:
    """All states first, then the old ones are dropped: whenever this is killed, every run has a state of one step."""
    for stack, runs in stacks:
        for point, run in enumerate(runs):
            run.save_state(step, stack.state(point))
            run.save(_for_use(stack, point, cfg), step, "training")
    for _, runs in stacks:
        for run in runs:
            run.drop_states(keep=step)


def _for_use(stack: Stack, point: int, cfg: TrainingConfig) -> Any:
    """The SAE as it is saved, rounded to the precision of its file."""
    return stack.finished(point).to(getattr(torch, cfg.weights_dtype))


def _short_evaluation(
    lm: LanguageModel, stacks: list[tuple[Stack, list[Run]]], held_out: Tensor
) -> dict[Path, dict[str, float | None]]:
    """A few held-out figures of every run while training."""
    contexts = held_out[: max(1, _SHORT_EVAL_TOKENS // held_out.shape[1])]
    found = {}
    for layer in sorted({stack.cfg.hook_layer for stack, _ in stacks}):
        of_layer = [
            (run, stack, i) for stack, runs in stacks for i, run in enumerate(runs) if run.sae.hook_layer == layer
        ]
        saes = [stack.finished(point) for _, stack, point in of_layer]
        results = evaluate_tokens(lm, layer, saes, contexts, 1, per_head=False)
        keys = ("L0", "FVU", "CE_clean", "CE_sae", "CE_score", "KL_score")
        for (run, _, _), result in zip(of_layer, results, strict=True):
            found[run.path] = {f"held_out_{key}": result[key] for key in keys}
    return found


def _progress(lines: list[dict[str, Any]]) -> str:
    """The end of the progress bar: all SAEs, or as many as fit on a line."""
    shown = " | ".join(f"L0 {line['L0']:.1f} FVU {line['FVU']:.3f}" for line in lines[:4])
    more = f" | {len(lines) - 4} more" if len(lines) > 4 else ""
    return f"{shown}{more} | {lines[0]['tokens_per_second']:,.0f} tok/s"


def _dataset(activations: ActivationsConfig) -> str:
    if activations.dataset:
        return activations.dataset
    return EMBEDDED if activations.model == embedded.NAME else "Skylion007/openwebtext"


def _context_size(activations: ActivationsConfig, lm: LanguageModel) -> int:
    size = activations.context_size or (128 if _dataset(activations) == EMBEDDED else min(1024, lm.n_ctx))
    if size > lm.n_ctx:
        raise ValueError(f"context_size {size} exceeds the {lm.n_ctx} positions of {lm.name}")
    return size


def _fill(source: CachedActivations, lm: LanguageModel, corpus: Corpus) -> None:
    if not source.missing():
        print(f"Activations: from the cache {', '.join(map(str, source.keys))}", flush=True)
        return
    with tqdm(unit="tok", unit_scale=True, desc="Harvesting activations", dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        source.fill(lm, corpus, progress)


def _describe_data(
    lm: LanguageModel, activations: ActivationsConfig, corpus: Corpus, source: Source
) -> Callable[[int], dict[str, Any]]:
    """What config.json says about the model, the text and the order in which it is read, for a layer."""
    model = {
        "name": lm.name,
        "fingerprint": lm.fingerprint(),
        "n_heads": lm.n_heads,
        "d_head": lm.d_head,
        "dtype": activations.model_dtype,
        "processing": PROCESSING,
    }
    text = {
        "name": corpus.name,
        "fingerprint": corpus.fingerprint,
        "context_size": corpus.context_size,
        "held_out_fraction": activations.held_out_fraction,
        "text_column": activations.text_column,
    }
    return lambda layer: {
        "model": {**model, "hook_name": f"blocks.{layer}.attn.hook_z", "hook_layer": layer},
        "text": text,
        "activations": "cached" if isinstance(source, CachedActivations) else "live",
    }
