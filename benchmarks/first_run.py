"""Where the README's first run spends its time, and a second SAE on the same activations.

    python -m benchmarks.first_run [option of python -m trainer ...]

The cache of activations begins empty; the language model is there already.
"""

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIRST = "--distinct_tokens=130000 --total_training_steps=300 --batch_size=2048"


def main(more: list[str]) -> None:
    from trainer import embedded, train
    from trainer.__main__ import main as run

    seconds: dict[str, float] = {}

    def timed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **options)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

        return call

    model = embedded.ensure()
    parts = {"harvest": "harvest_missing", "training": "_loop", "evaluation": "evaluate"}
    for name, function in parts.items():
        setattr(train, function, timed(name, getattr(train, function)))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ATTN_SAES_CACHE"] = folder
        embedded.folder().parent.mkdir(parents=True)
        embedded.folder().symlink_to(model)
        for what, options in (("first SAE", []), ("second SAE", ["--k=16"])):
            seconds.clear()
            out = str(Path(folder) / "checkpoints")
            assert run([*shlex.split(FIRST), *more, *options, f"--out={out}", "--wandb=disabled"]) == 0
            rows.append((what, dict(seconds)))
    print("\n| | harvest, s | training, s | evaluation, s | evaluation / (harvest + training) |\n|---|---|---|---|---|")
    for what, took in rows:
        harvest, training, evaluation = (took.get(name, 0.0) for name in parts)
        share = evaluation / (harvest + training)
        print(f"| {what} | {harvest:.0f} | {training:.0f} | {evaluation:.0f} | {share:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
