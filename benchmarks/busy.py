"""A training step, the language model and the passes of an analysis while other programs take the same cores: as beside
an app, or on a shared machine.

    python -m benchmarks.busy [part of a row's name ...]
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from analysis.attribution import Reader
from analysis.corpus.descriptions import FurtherFirings
from analysis.corpus.passes import Strips, choose_examples, chunks
from analysis.corpus.running_statistics import FeatureStatistics
from benchmarks.analysis import DEFAULT
from benchmarks.steps import CANDIDATES, build
from benchmarks.timing import rounds, spread
from trainer.checkpoint import Checkpoint
from trainer.embedded import NAME
from trainer.model.lm import LanguageModel

BATCH, ROUNDS = 1024, 5
MODEL = "the embedded model to layer 17, 1,024 tokens"
PASSES = {name: f"{name} pass of an analysis but its model, 4,096 tokens" for name in ("first", "second")}
ROWS = [
    "ours april, dense path",
    "ours april, 1 % active, sparse path",
    "ours jumprelu",
    "ours gated",
    "ours topk k=16 per head",
    "ours topk k=192 of the layer",
    "ours batchtopk k=192 of the layer",
    MODEL,
    *PASSES.values(),
]


def model() -> Callable[[], object]:
    layer = LanguageModel.load(NAME).layer(17)
    tokens = torch.randint(1000, 20_000, (BATCH // 128, 128), generator=torch.Generator().manual_seed(0))
    return lambda: layer.z(tokens)


def passes() -> dict[str, Callable[[], object]]:
    """Of one forward, which every call begins with."""
    saved = Checkpoint(DEFAULT)
    lm = saved.open_model()
    layer, contexts = lm.layer(saved.layer), saved.open_text(lm.tokenizer).held_out(32)
    reader, batch = Reader(saved.sae, layer), next(chunks(layer, contexts, torch.arange(len(contexts))))

    def first() -> FeatureStatistics:
        statistics = FeatureStatistics(reader, lm.d_vocab, 20)
        statistics.update(batch)
        return statistics

    examples = choose_examples(first(), 10, contexts.shape[1])

    def second() -> None:
        Strips(reader, examples).update(batch)
        FurtherFirings(reader, 0).update(batch)

    return {PASSES["first"]: first, PASSES["second"]: second}


def spin() -> None:
    while True:
        pass


@contextmanager
def load() -> Iterator[None]:
    """As many processes that never wait as there are cores."""
    others = [
        multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)
    ]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()


def main(names: list[str]) -> None:
    assert set(ROWS) - {MODEL, *PASSES.values()} <= set(CANDIDATES)
    chosen = [row for row in ROWS if not names or any(name in row for name in names)]
    apart = passes() if set(PASSES.values()) & set(chosen) else {}
    apart |= {MODEL: model()} if MODEL in chosen else {}
    candidates = {name: apart[name] if name in apart else build(name, BATCH) for name in chosen}
    idle = rounds(candidates, ROUNDS)
    with load():
        busy = rounds(candidates, ROUNDS)
    n = os.cpu_count()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {n} cores, {n} other processes, {ROUNDS} rounds"
    )
    print(f"\n| batch {BATCH:,} | idle: ms (quartiles) | busy: ms (quartiles) | busy / idle |\n|---|---|---|---|")
    for name in chosen:
        medians = [spread(values[name])[0] for values in (idle, busy)]
        cells = [
            "{:,.0f} ({:,.0f} to {:,.0f})".format(*(1e3 * t for t in spread(values[name]))) for values in (idle, busy)
        ]
        print(f"| {name} | {cells[0]} | {cells[1]} | {medians[1] / medians[0]:.1f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
