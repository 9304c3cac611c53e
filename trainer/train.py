"""Training, top to bottom: one stream of activations, any number of SAEs."""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from trainer import ranks
from trainer.block_diag import BlockDiagSAE
from trainer.cache import harvest_missing
from trainer.checkpoint import Model, Text
from trainer.config import ActivationsConfig, SAEConfig, TrainingConfig
from trainer.cost import expected
from trainer.data.buffer import CachedActivations, batches, batches_in, buffer_rows, open_source
from trainer.data.text import Corpus, open_text
from trainer.evaluate import default_tokens, evaluate, evaluate_tokens, kept_effects
from trainer.interrupts import Interrupted, deferred_interrupts
from trainer.model.lm import LanguageModel, pick_device
from trainer.optimise.initialise import initial_params, input_scale
from trainer.optimise.stack import Stack
from trainer.precision import tf32
from trainer.run import Run, plan
from trainer.tracking import Mode, reachable

_STATISTICS_ROWS = 32_768  # rows from which the input scale and the biases are estimated
_SHORT_EVAL_TOKENS = 2048
_EXPLODED = 100.0  # relative error of an SAE that has left the data


class Member(NamedTuple):
    """One SAE in training: its directory, and its place in the stack of those that differ only in sparsity."""

    run: Run
    stack: Stack
    point: int

    def for_use(self) -> BlockDiagSAE:
        """The SAE as it is saved, rounded to the precision of its file."""
        return self.stack.finished(self.point).to(getattr(torch, self.run.training.weights_dtype))


def train(activations: ActivationsConfig, saes: list[SAEConfig], cfg: TrainingConfig) -> list[Path]:
    """Train SAEs on one stream of activations and evaluate them; returns their checkpoint directories.

    Under torchrun every process calls this; all of them take one step together, and the first one writes.

    Raises:
        Lost: another process is gone.
        ValueError: the model, layer, text or an existing directory does not allow the run.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    if ranks.may_restart():  # by the same command
        cfg = replace(cfg, resume=True)
    with ranks.joined(), plan(activations, saes, cfg) as runs:
        _train(activations, runs, cfg)
    return [run.path for run in runs]


def _train(activations: ActivationsConfig, runs: list[Run], cfg: TrainingConfig) -> None:
    # Open: model, text. Everything that can be refused is refused before hours of work.
    ranks.share(cfg.batch_size)
    device, lm_device = (ranks.own_device(pick_device(each)) for each in (cfg.device, cfg.lm_device or cfg.device))
    mode: Mode = reachable(cfg.wandb) if ranks.is_first() else "disabled"
    layers = sorted({run.sae.hook_layer for run in runs})
    print(f"Loading {activations.model} on {lm_device}", flush=True)
    lm = LanguageModel.load(activations.model, lm_device, activations.model_dtype)
    corpus = open_text(activations, lm)
    print(f"Text: {corpus.describe()}", flush=True)
    n_held_out = cfg.eval_tokens or default_tokens(lm_device)
    held_out = corpus.held_out(corpus.n_contexts(n_held_out))
    for run in runs:
        _check(run.sae, lm)
    with tf32(lm_device if device == "cpu" else device, cfg.tf32):
        members = _fit(activations, runs, cfg, device, lm, corpus, held_out, mode)

    # Evaluate, layer by layer: SAEs of one layer share every forward that does not depend on them.
    n_documents = corpus.n_documents(held_out)
    print(f"Evaluating on {n_held_out:,} held-out tokens and as many repeated random tokens", flush=True)
    for index in layers:
        of_layer = [(member.run, member.for_use()) for member in members if member.run.sae.hook_layer == index]
        evaluated = [sae.float() for _, sae in of_layer]
        results = evaluate(lm.layer(index), evaluated, held_out, n_documents, cfg.seed, kept_effects(), progress=True)
        for (run, sae), result in zip(of_layer, results, strict=True):
            run.complete(sae.to(getattr(torch, cfg.weights_dtype)), result)
            score = "not measurable" if result["KL_score"] is None else f"{result['KL_score']:.3f}"
            print(f"{run.path}: L0 {result['L0']:.1f}, FVU {result['FVU']:.3f}, KL score {score}")


def _fit(
    activations: ActivationsConfig,
    runs: list[Run],
    cfg: TrainingConfig,
    device: str,
    lm: LanguageModel,
    corpus: Corpus,
    held_out: Int[Tensor, "context pos"],
    mode: Mode,
) -> list[Member]:
    """Harvest, start or resume, and take all steps."""
    layers = sorted({run.sae.hook_layer for run in runs})
    n_tokens = cfg.total_training_steps * cfg.batch_size
    begun = {run.begun_as for run in runs if run.begun_as}
    if len(begun) > 1:
        raise ValueError("these runs were begun by commands that shuffled otherwise: resume them one by one")
    kind, rows = next(iter(begun)) if begun else (None, buffer_rows(lm, len(layers), cfg))
    source = open_source(lm, activations, layers, corpus, n_tokens, rows, cfg.seed, kind)
    batches_in(source, 0, cfg.batch_size)
    kind = "cached" if isinstance(source, CachedActivations) else "live"
    models, text = {index: Model.of(lm.layer(index)) for index in layers}, Text.of(corpus)
    for run in runs:
        run.describe(models[run.sae.hook_layer], text, kind, rows)

    # The stream: harvested to disk first, where it fits there, and begun at the last step that all runs have saved.
    step = ranks.decided(max(set.intersection(*(run.saved_steps() for run in runs)), default=0))
    n_first = 0 if step else min(-(-_STATISTICS_ROWS // cfg.batch_size), cfg.total_training_steps)
    stacks = [[run.sae for run in group] for group in _groups(runs)]
    cost = expected(
        source, lm, stacks, replace(cfg, buffer_tokens=rows), device, held_out, cfg.total_training_steps - step,
        n_first * cfg.batch_size,
    )  # fmt: skip
    print(cost.describe(), flush=True)
    cost.refuse(device, Path(cfg.out))
    if step < cfg.total_training_steps:
        distinct = source.distinct_tokens
        print(f"The run reads {n_tokens:,} tokens: {distinct:,} distinct ones, {n_tokens / distinct:.1f} times")
        if isinstance(source, CachedActivations):
            harvest_missing(source, lm, corpus)
    stream = batches(source, cfg.batch_size, cfg.seed, step, device)

    # Start, or resume.
    if step:
        members = [member for group in _groups(runs) for member in _resume(group, step, cfg, device)]
    else:  # the first batches are also the data from which the SAEs start
        first = [next(stream) for _ in range(n_first)]
        members = []
        for group in _groups(runs):
            place = layers.index(group[0].sae.hook_layer)
            z = torch.cat([ranks.gathered(batch[:, place]) for batch in first])[:_STATISTICS_ROWS]
            members += _start(group, z.cpu().float(), cfg, device)
        stream = chain(first, stream)
        del first
    for member in members:
        member.run.begin(step, member.stack.finished(member.point), mode)

    _loop(members, layers, stream, step, cfg, lm, held_out)
    return members


def _groups(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ only in their sparsity are trained as one stack."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.sae.all_but_sparsity(), []).append(run)
    return list(groups.values())


def _start(runs: list[Run], z: Float[Tensor, "row head d_head"], cfg: TrainingConfig, device: str) -> list[Member]:
    """A stack before its first step."""
    sae = runs[0].sae
    scale = input_scale(z, sae.normalize)
    if sae.block == "dense":
        scale = scale.view(1, -1)
    varies = (z.amax(0) > z.amin(0)).any(-1)
    if not varies.any():
        raise ValueError(
            f"the activations of layer {sae.hook_layer} are constant over {len(z):,} rows: "
            "there is nothing to explain, train another layer"
        )
    for head in (~varies).nonzero()[:, 0].tolist():  # the others are trained as without it
        print(f"Layer {sae.hook_layer}: head {head} is constant over {len(z):,} rows, nothing of it is to be explained")
    n_features = scale.shape[1] * sae.expansion_factor
    x = z.reshape(len(z), *scale.shape) * scale
    # The points start equal: their sparsity is no part of the initialisation.
    params = initial_params(sae, x, n_features, torch.Generator().manual_seed(cfg.seed))
    stack = Stack([run.sae for run in runs], [params] * len(runs), scale.to(device), cfg)
    ranks.copied([stack.scale, *stack.params.values()])
    return [Member(run, stack, point) for point, run in enumerate(runs)]


def _resume(runs: list[Run], step: int, cfg: TrainingConfig, device: str) -> list[Member]:
    """A stack as it was saved after `step` steps."""
    states = [run.load_state(step) for run in runs]
    params = [{name: state[name] for name in state if f"adam.exp_avg.{name}" in state} for state in states]
    stack = Stack([run.sae for run in runs], params, states[0]["scale"].to(device), cfg)
    stack.load_states(step, states)
    return [Member(run, stack, point) for point, run in enumerate(runs)]


def _loop(
    members: list[Member],
    layers: list[int],
    stream: Iterator[Float[Tensor, "share layer head d_head"]],
    first: int,
    cfg: TrainingConfig,
    lm: LanguageModel,
    held_out: Int[Tensor, "context pos"],
) -> None:
    stacks = list(dict.fromkeys(member.stack for member in members))
    total = cfg.total_training_steps
    bar = tqdm(
        total=total, initial=first, unit="step", desc="Training", dynamic_ncols=True, disable=not ranks.is_first()
    )
    since, waited, logged = time.perf_counter(), 0.0, first
    with bar, deferred_interrupts() as asked_to_stop:
        for step in range(first + 1, total + 1):
            asked = time.perf_counter()
            z = next(stream)
            waited += time.perf_counter() - asked
            for stack in stacks:
                stack.update(z[:, layers.index(stack.cfg.hook_layer)].float())
            bar.update()
            evaluates = cfg.eval_every and step % cfg.eval_every == 0 and step < total
            if step % cfg.log_every == 0 or step == total or evaluates:
                elapsed = time.perf_counter() - since
                speed = {
                    "tokens_per_second": (step - logged) * cfg.batch_size / elapsed,
                    "activations_share": waited / elapsed,
                }
                held = _short_evaluation(lm, members, held_out) if evaluates else {}
                for run, stack, point in members:
                    figures, histograms = stack.figures(point)
                    _check_sane(run, stack, point, step)
                    run.record(step, figures | speed | held.get(run.path, {}), histograms)
                bar.set_postfix_str(_progress([member.run.latest for member in members]), refresh=False)
                since, waited, logged = time.perf_counter(), 0.0, step
            # Saved after the last step too: the evaluation may yet be interrupted.
            stopping = ranks.any_of(asked_to_stop())
            if step % cfg.save_every == 0 or step == total or stopping:
                _save(members, step)
            if stopping:
                raise Interrupted(f"stopped at step {step:,}; the same command with --resume=true goes on")


def _check_sane(run: Run, stack: Stack, point: int, step: int) -> None:
    """Refuse to go on from, to log or to save an SAE that has exploded.

    Writing nothing at all has a relative error of 1; at 100 the output is nine times as long as the input or longer.
    """
    error = stack.relative_error(point)
    if not error < _EXPLODED:  # also where it is not a number
        kept = max(run.saved_steps(), default=0)
        raise ValueError(
            f"{run.path.name} exploded at step {step:,}: its error is {error:.2g} times the size of the activations; "
            f"lower lr. The last saved step is {kept:,}"
        )


def _save(members: list[Member], step: int) -> None:
    """All states first, then the old ones are dropped: whenever this is killed, every run has a state of one step."""
    for member in members:
        _check_sane(*member, step)
    for member in members:
        member.run.save_state(step, member.stack.state(member.point))
        member.run.save(member.for_use(), step, "training")
    for member in members:
        member.run.drop_states(keep=step)


def _short_evaluation(
    lm: LanguageModel, members: list[Member], held_out: Int[Tensor, "context pos"]
) -> dict[Path, dict[str, float | None]]:
    """A few held-out figures of every run while training."""
    contexts = held_out[: max(1, _SHORT_EVAL_TOKENS // held_out.shape[1])]
    figures = {}
    for index in sorted({member.run.sae.hook_layer for member in members}):
        of_layer = [member for member in members if member.run.sae.hook_layer == index]
        saes = [member.stack.finished(member.point) for member in of_layer]
        results = evaluate_tokens(lm.layer(index), saes, contexts, 1, per_head=False, cache=kept_effects())
        keys = ("L0", "FVU", "CE_clean", "CE_sae", "CE_score", "KL_score")
        for member, result in zip(of_layer, results, strict=True):
            figures[member.run.path] = {f"held_out_{key}": result[key] for key in keys}
    return figures


def _progress(lines: list[dict[str, Any]]) -> str:
    """The end of the progress bar: all SAEs, or as many as fit on a line."""
    shown = " | ".join(f"L0 {line['L0']:.1f} FVU {line['FVU']:.3f}" for line in lines[:4])
    more = f" | {len(lines) - 4} more" if len(lines) > 4 else ""
    return f"{shown}{more} | {lines[0]['tokens_per_second']:,.0f} tok/s"


def _check(sae: SAEConfig, lm: LanguageModel) -> None:
    """Refuse a layer that the model has not, and more features than there are to choose from."""
    lm.layer(sae.hook_layer)
    per_head = lm.d_head * sae.expansion_factor
    available = per_head * (1 if sae.block == "head" and sae.k_scope == "head" else lm.n_heads)
    if sae.k and sae.k > available:
        raise ValueError(f"k must lie between 1 and {available:,}, the features to choose from; got {sae.k}")
