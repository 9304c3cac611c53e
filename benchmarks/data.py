"""What feeds the training step: a pass over the cache against its files read bare, training from the cache against no
reading at all, harvesting against the bare forward, and language model + SAE for 1 and for 8 points of a sweep.

    python -m benchmarks.data
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import rounds, spread
from trainer.config import SAEOptions, TrainingConfig
from trainer.data.buffer import CachedActivations, CacheKey, LiveActivations, batches, batches_in
from trainer.data.text import Corpus
from trainer.files import save_tensors
from trainer.model.lm import LanguageModel
from trainer.optimise.initialise import initial_params, input_scale
from trainer.optimise.stack import Stack

LAYER, ROUNDS, BATCH = 17, 5, 2048


def a_stack(rows: torch.Tensor, recipe: str, sparsities: list[float], expansion_factor: int = 16) -> Stack:
    """A stack on rows `[row, head, d_head]`."""
    key = "k" if recipe == "batchtopk" else "l1_coefficients"
    options = {"recipe": recipe, "hook_layer": LAYER, "expansion_factor": expansion_factor}
    saes = SAEOptions(**options, **{key: sparsities}).decide()
    scale = input_scale(rows, "per_head")
    n_features = rows.shape[2] * expansion_factor
    params = [initial_params(sae, rows * scale, n_features, torch.Generator().manual_seed(0)) for sae in saes]
    return Stack(saes, params, scale, TrainingConfig(batch_size=BATCH))


def harvesting(lm: LanguageModel, corpus: Corpus, folder: Path) -> None:
    contexts = torch.stack([context for context, _ in zip(corpus.train(), range(64), strict=False)])
    key = CacheKey("m", "f", "float32", f"blocks.{LAYER}.attn.hook_z", "t", "f", 128, lm.n_heads, lm.d_head, "v")

    def bare() -> None:
        for chunk in contexts.split(32):
            lm.layer(LAYER).z(chunk)

    def cached() -> None:
        source = CachedActivations(folder, [key], [LAYER], len(contexts), BATCH, 0)
        for path in folder.glob("*/shard-*"):
            path.unlink()
        source.fill(lm, corpus, lambda done, total: None)

    tokens = contexts.numel()
    seconds = rounds({"truncated forward alone": bare, "harvest into the cache": cached}, ROUNDS)
    report(f"Harvest of {tokens:,} tokens to layer {LAYER}", seconds, "truncated forward alone", tokens)


def synthetic(folder: Path) -> CachedActivations:
    """A cache of 16 shards (0.6 GB), read in groups of two."""
    key = CacheKey("m", "g", "float32", f"blocks.{LAYER}.attn.hook_z", "t", "f", 128, 9, 64, "v")
    source = CachedActivations(folder, [key], [LAYER], 16 * 256, 65_536, 0)
    (path,) = source.keys
    path.mkdir(parents=True)
    for index in source.missing():
        shard = path / f"shard-{index:05d}.safetensors"
        save_tensors(shard, {"z": torch.randn(256 * 127, 9, 64).half()}, f"{path.name} {index}")
    return source


def forgotten(folder: Path) -> list[Path]:
    """Its files, none of them in the system's memory any more."""
    files = sorted(folder.rglob("shard-*"))
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return files


def shuffling(folder: Path, source: CachedActivations) -> None:
    """A pass over the cache: checked, shuffled, cut into batches."""
    rows = source.distinct_tokens

    def bare() -> None:
        for path in forgotten(folder):
            path.read_bytes()

    def a_pass() -> None:
        forgotten(folder)
        stream = batches(source, BATCH, seed=0)
        for _ in range(sum(batches_in(source, group, BATCH) for group in range(8))):
            next(stream)

    seconds = rounds({"files read": bare, "batches": a_pass}, ROUNDS)
    report(f"A pass over {rows * 9 * 64 * 2 / 1e9:.1f} GB, nothing of it in memory", seconds, "files read", rows)


def reading(source: CachedActivations) -> None:
    """The cache, read while a batchtopk SAE trains on it."""
    fixed = torch.randn(BATCH, 9, 64)
    stream = batches(source, BATCH, seed=0)
    alone, fed = (a_stack(fixed, "batchtopk", [32]) for _ in range(2))

    def steps(next_batch: Callable[[], torch.Tensor], stack: Stack) -> None:
        for _ in range(32):
            stack.update(next_batch().float())

    seconds = rounds(
        {
            "SAE step alone": lambda: steps(lambda: fixed, alone),
            "from the cache": lambda: steps(lambda: next(stream)[:, 0], fed),
        },
        ROUNDS,
    )
    report("32 batchtopk steps (x16)", seconds, "SAE step alone", 32 * BATCH)


def end_to_end(lm: LanguageModel, corpus: Corpus) -> None:
    """Two batches from text to trained SAEs; what eight separate runs would cost is 8 x one point."""
    contexts = torch.stack([context for context, _ in zip(corpus.train(), range(34), strict=False)])
    rows = lm.layer(LAYER).z(contexts)[:, 1:].flatten(0, 1)
    sparsities = [8, 12, 16, 24, 32, 48, 64, 96]
    stacks = {1: a_stack(rows, "batchtopk", sparsities[4:5]), 8: a_stack(rows, "batchtopk", sparsities)}

    def run(points: int) -> None:
        stream = batches(LiveActivations(lm, [LAYER], corpus, 34, 34 * 127), BATCH, seed=0)
        for _ in range(2):
            stacks[points].update(next(stream)[:, 0].float())

    names = {"1 point": lambda: run(1), "8 points on one stream": lambda: run(8)}
    report(f"Language model + SAE, {2 * BATCH:,} tokens", rounds(names, ROUNDS), "1 point", 2 * BATCH)


def report(title: str, seconds: dict[str, list[float]], base: str, tokens: int) -> None:
    print(f"{title}\n\n| | s (quartiles) | to {base} | tokens/s |\n|---|---|---|---|")
    reference = spread(seconds[base])[0]
    for name, values in seconds.items():
        median, low, high = spread(values)
        row = f"{median:.2f} ({low:.2f} to {high:.2f}) | {median / reference:.2f} | {tokens / median:,.0f}"
        print(f"| {name} | {row} |", flush=True)
    print()


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, {ROUNDS} rounds\n")
    lm = LanguageModel.load("smollm2-135m")
    corpus = Corpus("sotu", lm.tokenizer, 128)
    with tempfile.TemporaryDirectory() as folder:
        source = synthetic(Path(folder) / "reading")
        shuffling(Path(folder) / "reading", source)
        reading(source)
        harvesting(lm, corpus, Path(folder) / "harvest")
    end_to_end(lm, corpus)


if __name__ == "__main__":
    main()
