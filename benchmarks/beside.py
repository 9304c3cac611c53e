"""The app beside a training run on the same cores: what a click waits, and what the training loses by it.

    python -m benchmarks.beside

A training of the default SAE of layer 17 (activations in the cache, so that every moment of it is steps) is stopped and
let go on by signals, so that alone and together take turns. Somebody who clicks as fast as the page answers is the
worst case for the training; nobody who clicks, with the page open, the best.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from playwright.sync_api import Page

from benchmarks.app import ROOT, TEXT, choices, chosen, fill, idle, served, until_idle
from benchmarks.timing import spread

ROUNDS, WAIT = 4, 20  # seconds of training alone in a round
TRAINING = (
    "--distinct_tokens=32768 --buffer_tokens=32768 --total_training_steps=1000000 --log_every=1 "
    "--eval_every=0 --save_every=1000000"
)


class Training:
    """A run in a process of its own."""

    def __init__(self, out: Path) -> None:
        command = [sys.executable, "-m", "trainer", *TRAINING.split(), f"--out={out}", "--wandb=disabled"]
        self._run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._out = out
        while self.steps() < 3:
            assert self._run.poll() is None, "the training ended"
            time.sleep(0.5)

    def steps(self) -> int:
        """Taken so far."""
        return sum(file.read_bytes().count(b"\n") for file in self._out.glob("*/metrics.jsonl"))

    def stop(self) -> None:
        self._run.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._run.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self._run.kill()
        self._run.wait()


def clicks(page: Page, i: int) -> dict[str, float]:
    """Seconds until the page is complete after each thing that one does in a round."""
    prompt = until_idle(page, fill(page, "Prompt", f"{i} {TEXT * 3}"))
    steps = choices(page)
    taken = {name: chosen(page, partial(steps[name], i))[1] for name in ("a token", "a head")}
    return {"a new prompt of 66 tokens": prompt, **taken}


def main() -> None:
    waited: dict[str, list[dict[str, float]]] = {"alone": [], "beside": []}
    rates: dict[str, list[float]] = {"nobody clicks": [], "somebody clicks all the time": []}
    with tempfile.TemporaryDirectory() as out, served(ROOT / "checkpoints") as (_, address, browser):
        page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
        page.set_default_timeout(600_000)
        page.goto(f"{address}/prompt")
        idle(page)
        turns = iter(range(2 * ROUNDS + 1))
        clicks(page, next(turns))  # what the first of each kind sets up
        training = Training(Path(out))
        try:
            for i in range(ROUNDS):
                for how in ("alone", "beside") if i % 2 == 0 else ("beside", "alone"):
                    if how == "alone":
                        training.stop()
                    before, started = training.steps(), time.perf_counter()
                    waited[how].append(clicks(page, next(turns)))
                    training.go_on()
                    if how == "beside":
                        taken = training.steps() - before
                        rates["somebody clicks all the time"].append(taken / (time.perf_counter() - started))
                before, started = training.steps(), time.perf_counter()
                time.sleep(WAIT)
                rates["nobody clicks"].append((training.steps() - before) / (time.perf_counter() - started))
        finally:
            training.go_on()
            training.end()
    print(f"{os.cpu_count()} cores, {ROUNDS} rounds; seconds until the page is complete, median (quartiles)\n")
    print("| Prompt | app alone | beside the training | times |\n|---|---|---|---|")
    for name in waited["alone"][0]:
        columns = [[each[name] for each in rounds] for rounds in waited.values()]
        said = ["{:.2f} ({:.2f} to {:.2f})".format(*spread(values)) for values in columns]
        times = statistics.median(columns[1]) / statistics.median(columns[0])
        print(f"| {name} | {' | '.join(said)} | {times:.1f} |")
    steps = {name: "{:.2f} ({:.2f} to {:.2f})".format(*spread(values)) for name, values in rates.items()}
    print(f"\nSteps of the training a second: {'; '.join(f'{name} {rate}' for name, rate in steps.items())}.")


if __name__ == "__main__":
    main()
