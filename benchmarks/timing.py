"""Side-by-side timing: every candidate once a round, so that a noisy minute hits all of them."""

import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any


def rounds(candidates: dict[str, Callable[[], Any]], n: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each of `n` rounds, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(n + 1):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if index:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return statistics.median(values), quartiles[0], quartiles[2]


def peak_mb(build: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """Resident memory that building and running a candidate adds to a fresh process, in MB."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_grow, (build, arguments))


def _grow(build: Callable[..., Callable[[], Any]], arguments: tuple) -> float:
    import torch

    (torch.randn(256, 256) @ torch.randn(256, 256)).sum()  # what the first matmul sets up is not the candidate's
    before = _status_mb("VmRSS")
    run = build(*arguments)
    for _ in range(3):
        run()
    return _status_mb("VmHWM") - before


def _status_mb(key: str) -> float:
    """Of this process alone; `ru_maxrss` of a child begins at what its parent had."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) / 1024
