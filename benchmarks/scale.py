"""What a large run costs: a model of its time, fitted to what was measured on a GPU, with its error where it was not
fitted.

    python -m benchmarks.scale

Measured points are read from the table "On a GPU" of benchmarks/README.md. Messages between processes are measured
here, with gloo on this machine's processors; between GPUs nothing was measured, and links count with the figures of
their makers. docs/scale.md says what follows.
"""

import re
import statistics
import time
from dataclasses import dataclass
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

POINTS, TOKENS, BATCH, EXPANSION = 8, 4e9, 4096, 32
MEASURED_BATCH = 4096
RECIPES = {"april": "april", "batchtopk": "batchtopk k=192"}  # as the two parts of the table call them
# Bytes/s that one GPU sends: NVLink of an H100 within a machine of 8, 400 Gb/s InfiniBand between them.
NVLINK, INFINIBAND, PER_MACHINE = 450e9, 50e9, 8
_ROUNDS = 9


@dataclass(frozen=True)
class Model:
    """The shape of a language model: what its matmuls cost follows."""

    name: str
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    d_head: int
    d_mlp: int
    mlp_matrices: int
    context: int

    def forward(self, layer: int) -> tuple[int, int]:
        """Operations per token up to the head outputs of a layer: of weights, and of attention, masked or not."""
        qkv = self.d_model * self.d_head * (self.heads + 2 * self.kv_heads)
        rest = self.d_model * (self.heads * self.d_head + self.mlp_matrices * self.d_mlp)
        attention = 4 * self.heads * self.d_head * self.context
        return 2 * (qkv * (layer + 1) + rest * layer), attention * (layer + 1)

    @property
    def d_in(self) -> int:
        return self.heads * self.d_head

    @property
    def d_sae(self) -> int:
        return self.d_in * EXPANSION

    @property
    def sae_parameters(self) -> int:
        """Of one block-diagonal SAE."""
        return self.d_sae * (2 * self.d_head + 1) + self.d_in

    @property
    def sae_flops(self) -> int:
        """Operations per token of a training step: five matmuls of the block-diagonal size."""
        return 10 * self.d_sae * self.d_head


GPT2 = Model("gpt2-small", 12, 768, 12, 12, 64, 3072, 2, 1024)
GEMMA = Model("Gemma 2 2B", 26, 2304, 8, 4, 256, 9216, 3, 1024)


@dataclass(frozen=True)
class Rates:
    """Of the model's matmuls and of its attention, operations/s; of a training step, seconds."""

    weights: float
    attention: float
    feature: float
    """per token and feature"""
    stack: float
    """per step of the SAEs of a layer, however few tokens it has"""

    def forward(self, model: Model, layer: int) -> float:
        """Seconds per token."""
        weights, attention = model.forward(layer)
        return weights / self.weights + attention / self.attention

    def sae(self, model: Model) -> float:
        """Seconds per token of one more SAE: bound by memory as at d_head 64, or by matmuls where heads are wide."""
        return max(self.feature * model.d_sae, model.sae_flops / self.weights)


def measured(table: str) -> dict[str, float]:
    """Tokens/s by row and precision."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \| ([\d,]+) \|", table, re.MULTILINE)
    return {f"{name}; {precision}": float(rate.replace(",", "")) for name, precision, rate in rows}


def at(context: int) -> Model:
    """gpt2-small at another context size."""
    return Model(**{**vars(GPT2), "context": context})


def fitted(rates: dict[str, float], recipe: str) -> Rates:
    """From four rows: the model at two context sizes, a recipe with one SAE and with eight."""
    seconds = [1 / rates[f"model to layer 5, contexts of {context:,}; TF32"] for context in (1024, 128)]
    (w_long, a_long), (w_short, a_short) = (at(context).forward(5) for context in (1024, 128))
    assert w_long == w_short
    per_attention = (seconds[0] - seconds[1]) / (a_long - a_short)
    per_weight = (seconds[1] - a_short * per_attention) / w_short
    one, eight = (1 / rates[f"ours {RECIPES[recipe]}{points}; TF32, compiled"] for points in ("", ", 8 points"))
    more = (eight - one) / 7
    return Rates(1 / per_weight, 1 / per_attention, more / GPT2.d_sae, (one - more) * MEASURED_BATCH)


def held_out(rates: dict[str, float], recipe: str) -> list[tuple[str, float, float]]:
    """Rows that were not fitted, tokens/s: what was measured, and what the model says."""
    found, fit = [], fitted(rates, recipe)
    for context, points in product((1024, 128), (1, 8)):
        name = f"model and {recipe}, {points} points, contexts of {context:,}; TF32, compiled"
        if name in rates:
            step = points * fit.sae(GPT2) + fit.stack / MEASURED_BATCH
            found.append((name, rates[name], 1 / (fit.forward(at(context), 5) + step)))
    return found


@dataclass(frozen=True)
class Cost:
    """GPU seconds of a run by what they are for; a GPU waits for its messages."""

    gpus: int
    forward: float
    saes: float
    gradients: float
    rows: float

    @property
    def total(self) -> float:
        return self.forward + self.saes + self.gradients + self.rows


def cost(model: Model, fit: Rates, gpus: int, points: int = POINTS, batch: int = BATCH) -> Cost:
    """Of `points` SAEs on every layer, on TOKENS tokens: each GPU has a share of every batch, as torchrun does it."""
    n_saes, steps = points * model.layers, TOKENS / batch
    link = NVLINK if gpus <= PER_MACHINE else INFINIBAND
    sent = 2 * (gpus - 1) / gpus * 4 * n_saes * model.sae_parameters  # ring all-reduce of float32, per GPU and step
    swapped = (gpus - 1) / gpus * batch / gpus * model.layers * model.d_in * 2  # float16 rows, per GPU and step
    return Cost(
        gpus,
        TOKENS * fit.forward(model, model.layers - 1),
        TOKENS * n_saes * fit.sae(model) + gpus * steps * model.layers * fit.stack,
        gpus * steps * sent / link,
        gpus * steps * swapped / link,
    )


def split(model: Model, fit: Rates, gpus: int, jobs: int) -> Cost:
    """The points dealt to jobs that say nothing to each other: each runs the model again."""
    one = cost(model, fit, gpus // jobs, POINTS // jobs)
    return Cost(gpus, *(jobs * each for each in (one.forward, one.saes, one.gradients, one.rows)))


def gloo(n: int, bytes_: int) -> float:
    """Seconds of an all-reduce among n processes on this machine."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with get_context("spawn").Pool(n) as pool:
        return max(pool.starmap(_all_reduce, [(rank, n, store.port, bytes_) for rank in range(n)], chunksize=1))


def _all_reduce(rank: int, n: int, port: int, bytes_: int) -> float:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
    flat, seconds = torch.ones(bytes_ // 4), []
    for _ in range(_ROUNDS + 1):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(flat)
        seconds.append(time.perf_counter() - started)
    dist.destroy_process_group()
    return statistics.median(seconds[1:])


def describe(model: Model) -> str:
    weights, attention = model.forward(model.layers - 1)
    n_saes = POINTS * model.layers
    parameters = n_saes * model.sae_parameters
    return (
        f"\n{model.name}, contexts of {model.context:,}: {TOKENS / 1e9:.0f} billion tokens, all {model.layers} layers, "
        f"{POINTS} points, expansion {EXPANSION}, batch {BATCH:,}: {n_saes} batchtopk SAEs of {model.d_sae:,} "
        f"features, {parameters / 1e9:.2f} billion parameters. Operations: the model "
        f"{TOKENS * (weights + attention):.1e}, the SAEs {TOKENS * n_saes * model.sae_flops:.1e}. A cache of all "
        f"activations: {TOKENS * model.layers * model.d_in * 2 / 1e12:.0f} TB. Parameters, gradients and Adam's "
        f"moments: {16 * parameters / 1e9:.1f} GB on every GPU. Hours of all GPUs together:"
    )


def main() -> None:
    rates = measured((Path(__file__).parent / "README.md").read_text())
    for recipe in RECIPES:
        fit = fitted(rates, recipe)
        print(
            f"{recipe}: {fit.weights / 1e12:.0f} TFLOP/s of weights, {fit.attention / 1e12:.0f} of attention, "
            f"{fit.feature * 1e12:.0f} ps per token and feature, {1e3 * fit.stack:.1f} ms per step of a layer.\n"
        )
    print("| not fitted | measured, tokens/s | by the model | error |\n|---|---|---|---|")
    for name, found, said in chain.from_iterable(held_out(rates, recipe) for recipe in RECIPES):
        print(f"| {name} | {found:,.0f} | {said:,.0f} | {said / found - 1:+.0%} |")
    for model in (GPT2, GEMMA):
        print(describe(model))
        print("\n| GPUs | model | SAEs | gradients | rows | GPU hours | hours | bound by |\n" + "|---" * 8 + "|")
        runs = [(str(n), cost(model, fit, n)) for n in (1, 8, 64)]
        runs.append(("64, batch 65,536", cost(model, fit, 64, batch=65_536)))
        runs.append(("64, as 8 jobs of a point", split(model, fit, 64, 8)))
        for name, run in runs:
            parts = {"model": run.forward, "SAEs": run.saes, "gradients": run.gradients, "rows": run.rows}
            hours = " | ".join(f"{each / 3600:,.0f}" for each in parts.values())
            wall, most = run.total / run.gpus / 3600, max(parts, key=lambda part: parts[part])
            print(f"| {name} | {hours} | {run.total / 3600:,.0f} | {wall:,.1f} | {most} |")
    size = 4 * GPT2.sae_parameters
    one, two = (gloo(n, size) for n in (1, 2))
    print(
        f"\nAll-reduce of the gradient of one SAE of gpt2-small ({size / 1e6:.1f} MB) with gloo, median of {_ROUNDS}: "
        f"{1e3 * one:.1f} ms in one process, {1e3 * two:.1f} ms among two ({size / two / 1e9:.1f} GB/s each way)."
    )


if __name__ == "__main__":
    main()
