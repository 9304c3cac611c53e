"""What a run will take of this machine: said before it starts, and refused where it does not fit.

Times are measured: a forward of some contexts, and one step of every kind of stack on random rows.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from jaxtyping import Int
from torch import Tensor

from trainer import ranks
from trainer.config import SAEConfig, TrainingConfig
from trainer.data.buffer import CachedActivations, Source, bytes_per_row
from trainer.effects import runs_per_token
from trainer.files import cache_dir
from trainer.model.lm import LanguageModel
from trainer.optimise.initialise import initial_params
from trainer.optimise.stack import Stack
from trainer.room import gb, require_disk, require_room

_TRIAL_TOKENS, _OF_A_GPU = 512, 16_384  # of a forward
_PER_PARAMETER = 4 * 4  # bytes: itself, its gradient and Adam's two moments
_OF_FILES = 2 * 3 * 4 + 4  # bytes of disk: the old and the new saved state, and the weights for use


class Cost(NamedTuple):
    """Bytes and seconds."""

    memory: float
    """of the machine, beyond what this process has already"""
    gpu: float
    """of the SAEs' GPU"""
    cache: float
    """that are still to be written to the cache folder"""
    checkpoints: float
    model: float
    """seconds"""
    saes: float
    evaluation: float

    def describe(self) -> str:
        """One sentence."""
        held = psutil.Process().memory_info().rss
        memory = gb(held + self.memory) + " of memory"
        memory += f", {gb(self.gpu)} of the GPU's" if self.gpu else ""
        memory += " in each process" if ranks.size() > 1 else ""
        hours = {"model": self.model, "SAEs": self.saes, "evaluation": self.evaluation}
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in hours.items())
        return (
            f"The run takes about {duration(sum(hours.values()))} ({parts}), {memory} and "
            f"{gb(self.cache + self.checkpoints)} of disk (activations {gb(self.cache)})"
        )

    def refuse(self, device: str, out: Path) -> None:
        """Stop before hours of work that cannot end well.

        Raises:
            ValueError: there is too little memory or disk.
        """
        fewer = "lower --buffer_gb, or train fewer SAEs at a time"
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        require_room(self.memory * here, psutil.virtual_memory().available, "of memory", fewer)
        if torch.device(device).type == "cuda":
            require_room(self.gpu, torch.cuda.mem_get_info(device)[0], f"on {device}", fewer)
        if self.cache:
            require_disk(cache_dir(), self.cache, "lower --cache_gb, and activations stream through memory")
        require_disk(out, self.checkpoints, "choose another --out")


def expected(
    source: Source,
    lm: LanguageModel,
    stacks: list[list[SAEConfig]],
    cfg: TrainingConfig,
    device: str,
    held_out: Int[Tensor, "context pos"],
    steps: int,
    first_rows: int,
) -> Cost:
    """Of a run; under torchrun all processes call this together, and each is told its own part.

    Args:
        stacks: SAEs that are trained together.
        cfg: with the number of tokens that are shuffled together.
        held_out: what is evaluated on, and the model timed with.
        steps: that are left.
        first_rows: from which the SAEs start.
    """
    layers = sorted({saes[0].hook_layer for saes in stacks})
    n = ranks.size()
    per_token, unembedding = seconds_per_token(lm, layers, held_out)
    found: dict[tuple[Any, ...], _OfStack] = {}  # stacks of several layers are alike
    for saes in stacks if steps else ():
        kind = _kind(saes)
        found[kind] = found.get(kind) or _of_stack(saes, lm, cfg, device)
    of_saes = [found[_kind(saes)] for saes in stacks] if steps else []
    parameters = sum(each.parameters for each in of_saes)

    cached = isinstance(source, CachedActivations)
    cache, missing = source.to_harvest() if isinstance(source, CachedActivations) else (0, steps * cfg.batch_size)
    of_block, evaluation = per_token / (layers[-1] + 1), 0.0
    for saes in stacks:
        of_run = of_block * (lm.n_layers - saes[0].hook_layer) + unembedding
        evaluation += 2 * held_out.numel() * runs_per_token(lm.n_heads, len(saes), len(held_out)) * of_run / n

    per_row = bytes_per_row(lm, len(layers)) / n
    group = min(cfg.buffer_tokens, source.distinct_tokens) * per_row
    kept = group * (n > 1) + first_rows * per_row  # what the others have sent, and what the SAEs start from
    training = kept + _PER_PARAMETER * parameters + max((each.scratch for each in of_saes), default=0)
    shared = torch.device(device).type != "cuda"  # what is not a GPU of its own has the machine's memory
    read = group * (2 if cached else lm.device.type == "cpu")
    return Cost(
        memory=read + training * shared if steps else 0.0,
        gpu=0.0 if shared or not steps else group + training,
        cache=cache,
        checkpoints=_OF_FILES * parameters,
        model=missing * per_token / n if steps else 0.0,
        saes=steps * sum(each.seconds for each in of_saes),
        evaluation=evaluation,
    )


def seconds_per_token(
    lm: LanguageModel, layers: list[int], contexts: Int[Tensor, "context pos"]
) -> tuple[float, float]:
    """Of the model up to the last of some layers, and of its unembedding."""
    at_once = _OF_A_GPU if lm.device.type == "cuda" else _TRIAL_TOKENS
    contexts = contexts[: max(1, at_once // contexts.shape[1])]
    final = torch.zeros(1, contexts.shape[1], lm.model.cfg.d_model, device=lm.device)
    harvested, unembedded = (lambda: lm.z_of(contexts, layers)), (lambda: lm.logits(final))
    return _seconds(harvested, lm.device) / contexts.numel(), _seconds(unembedded, lm.device) / final.shape[1]


class _OfStack(NamedTuple):
    seconds: float
    """of a step"""
    parameters: int
    scratch: float
    """bytes of a step beside the parameters"""


def _kind(saes: list[SAEConfig]) -> tuple[Any, ...]:
    return replace(saes[0], hook_layer=0).all_but_sparsity(), len(saes)


def _of_stack(saes: list[SAEConfig], lm: LanguageModel, cfg: TrainingConfig, device: str) -> _OfStack:
    dense, share = saes[0].block == "dense", ranks.share(cfg.batch_size)
    n_blocks, width = (1, lm.n_heads * lm.d_head) if dense else (lm.n_heads, lm.d_head)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(share, n_blocks, width, generator=generator)
    params = initial_params(saes[0], x, width * saes[0].expansion_factor, generator)
    stack = Stack(saes, [params] * len(saes), torch.ones(n_blocks, width, device=device), cfg)
    x = x.to(device)
    seconds = _seconds(lambda: stack.update(x), x.device)
    n_features = stack.params["b_enc"].numel()
    in_flight = 2 * stack.n_points * x.numel() if x.device.type == "cpu" else 4 * share * n_features
    return _OfStack(seconds, sum(each.numel() for each in stack.params.values()), 4 * in_flight)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of the second time."""
    for _ in range(2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
