"""On a GPU: one training step of ours and of SAELens, the language model, and both together; speed and memory.

    python -m benchmarks.gpu [--device cuda] [--small]

SAE steps at the reference's shape: 12 heads, d_head 64, 2,048 features per head, batch 4,096, float32 parameters.
SAELens is dense at the same width. The model has gpt2-small's sizes and random weights, since its speed depends on no
value; it runs up to the head outputs of layer 5, on random tokens, and no feature counts as dead on what it gives.
`--small` is the form that the tests run on a CPU.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from benchmarks import steps
from benchmarks.foreign import reference_step, saelens_step
from benchmarks.timing import spread
from trainer.config import TrainingConfig
from trainer.data.buffer import LiveActivations, batches, harvest
from trainer.model.lm import LanguageModel

LAYER, VOCABULARY = 5, 50_257
Build = Callable[[], Callable[[], object]]


class Size(NamedTuple):
    """What is timed: as in docs and tables, or small enough for a test."""

    heads: int = 12
    d_head: int = 64
    batch: int = 4096
    features: int = 2048
    contexts: tuple[tuple[int, int], ...] = ((16, 1024), (128, 128))
    """how many, how long"""
    group: int = 262_144
    rounds: int = 5
    seconds: float = 0.1
    """of each candidate in a round"""


SMALL = Size(2, 8, 32, 128, ((2, 16),), 64, 1, 0.0)


class RandomText:
    """What a source asks of a corpus: contexts without end."""

    name, n_streams = "random tokens", 1

    def __init__(self, context_size: int) -> None:
        self.context_size = context_size

    def train(self, start: int, stream: int = 0) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(start)
        while True:
            yield from torch.randint(VOCABULARY, (64, self.context_size), generator=generator)


def language_model(size: Size, device: str) -> LanguageModel:
    """gpt2-small's sizes and random weights, up to the layer."""
    cfg = HookedTransformerConfig(
        n_layers=LAYER + 1, d_model=size.heads * size.d_head, n_ctx=1024, d_head=size.d_head,
        n_heads=size.heads, d_mlp=4 * size.heads * size.d_head, d_vocab=VOCABULARY,
        act_fn="gelu_new", normalization_type="LNPre", device=device, seed=0,
    )  # fmt: skip
    return LanguageModel(HookedTransformer(cfg), "random weights of gpt2-small's sizes")


def sae_steps(size: Size, device: str) -> list[tuple[str, str, Build]]:
    """Name, precision, and how it is built."""

    def foreign(make: Callable, *arguments: object, **options: object) -> Callable[[], object]:
        torch.manual_seed(0)
        step = make(*arguments, size.heads, size.d_head, size.features, device=device, **options)
        z = steps.inputs(size.batch, device)
        return lambda: step(z)

    def ours(recipe: str, fused: bool = False, dead: float = 0.0, **options: object) -> Callable[[], object]:
        training = TrainingConfig(batch_size=size.batch, buffer_tokens=size.batch, compile=fused)
        made = steps.Ours(recipe, size.batch, below=0.0, device=device, training=training, **options)
        made.stack.params["b_enc"][:, : round(dead * size.features)] = -1e3
        made.stack.unfired[:, : round(dead * size.features)] = training.dead_after_tokens
        return made

    rows: list[tuple[str, str, Build]] = []
    for precision in ("float32", "TF32"):
        rows.append(("reference: dense block_diag", precision, partial(foreign, reference_step)))
    for kind in ("standard", "topk", "batchtopk"):
        name = "SAELens " + kind + (" k=192" if kind != "standard" else "")
        for precision in ("float32", "TF32", "autocast to bfloat16"):
            autocast = precision.startswith("autocast")
            rows.append((name, precision, partial(foreign, saelens_step, kind, k=16, autocast=autocast)))
    recipes: dict[str, dict] = {
        "april": {}, "bricken": {}, "gated": {}, "jumprelu": {}, "topk k=192": {"k": 192},
        "topk k=16 per head": {"k": 16, "k_scope": "head"}, "topk k=192, 5 % dead": {"k": 192, "dead": 0.05},
        "batchtopk k=192": {"k": 192}, "april, 8 points": {"points": 8},
        "batchtopk k=192, 8 points": {"k": 192, "points": 8},
    }  # fmt: skip
    for name, options in recipes.items():
        options = {each: min(value, size.features) if each == "k" else value for each, value in options.items()}
        recipe = name.split()[0].strip(",")
        for precision, fused in (("float32", False), ("TF32", False), ("TF32, compiled", True)):
            if "float32" not in precision or "points" not in name:
                rows.append((f"ours {name}", precision, partial(ours, recipe, fused, **options)))
    return rows


def both(
    lm: LanguageModel, size: Size, context: int, device: str, recipe: str, **options: object
) -> Callable[[], object]:
    """A group of the stream, harvested and trained on."""
    training = TrainingConfig(batch_size=size.batch, buffer_tokens=size.group, dead_after_tokens=10**12)
    made = steps.Ours(recipe, size.batch, below=0.0, device=device, training=training, **options)
    source = LiveActivations(lm, [LAYER], RandomText(context), 10**6, size.group)
    stream = batches(source, size.batch, 0, 0, device)

    def run() -> None:
        for _ in range(source.rows(0) // size.batch):
            made.stack.update(next(stream)[:, 0].float())

    return run


def timed(run: Callable[[], object], device: str, size: Size) -> tuple[list[float], float]:
    """Seconds of one call, in rounds of many calls, and the peak of the device's memory in MB."""
    on_gpu = device.startswith("cuda")

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(3 if on_gpu else 0):  # the first ones compile
        run()
    started = clock()
    run()
    n = max(1, int(size.seconds / (clock() - started)))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(size.rounds):
        started = clock()
        for _ in range(n):
            run()
        found.append((clock() - started) / n)
    return found, torch.cuda.max_memory_allocated() / 2**20 if on_gpu else float("nan")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args(arguments)
    device, size = args.device, SMALL if args.small else Size()
    on_gpu = device.startswith("cuda")
    steps.HEADS, steps.D_HEAD, steps.FEATURES = size.heads, size.d_head, size.features
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{name}, torch {torch.__version__}, {size}\n")
    print("| | precision | ms (quartiles) | tokens/s | peak MB |\n|---|---|---|---|---|")

    def row(name: str, precision: str, tokens: int, build: Build) -> None:
        if not on_gpu and precision != "float32":
            return
        torch.set_float32_matmul_precision("high" if "TF32" in precision else "highest")
        seconds, peak = timed(build(), device, size)
        median, low, high = (each * 1e3 for each in spread(seconds))
        speed = tokens / median * 1e3
        print(
            f"| {name} | {precision} | {median:,.2f} ({low:,.2f} to {high:,.2f}) | {speed:,.0f} | {peak:,.0f} |",
            flush=True,
        )
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()

    lm = language_model(size, device)
    for n, context in size.contexts:
        tokens = torch.randint(VOCABULARY, (n, context), generator=torch.Generator().manual_seed(0)).to(device)
        many = tokens.repeat(4, 1)
        of = f"contexts of {context:,}"
        for precision in ("float32", "TF32"):
            row(
                f"model to layer {LAYER}, {of}",
                precision,
                tokens.numel(),
                partial(partial, lm.z_of, tokens, [LAYER]),
            )
        row(f"harvest, {of}", "TF32", many.numel(), lambda t=many: lambda: list(harvest(lm, [LAYER], t)))
        rows = max(1, size.group // (context - 1)) * (context - 1) // size.batch * size.batch
        for recipe, options in (("april", {}), ("batchtopk", {"k": 192}), ("batchtopk", {"k": 192, "points": 8})):
            options = {each: min(value, size.features) for each, value in options.items()}
            name = f"model and {recipe}, {options.get('points', 1)} points, {of}"
            build = partial(both, lm, size, context, device, recipe, **options)
            row(name, "TF32, compiled" if on_gpu else "float32", rows, build)
    for name, precision, build in sae_steps(size, device):
        row(name, precision, size.batch, build)
    torch.set_float32_matmul_precision("highest")


if __name__ == "__main__":
    main()
