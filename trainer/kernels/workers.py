"""Small matmuls side by side, each on one thread.

A matmul of one block on all threads is a parallel region of its own, and ends when its last thread does: where another
program has that thread's core, every one of them waits (`python -m benchmarks.busy`). Blocks of an SAE know nothing of
each other, nor do contexts in a language model: they are what is done in parallel.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of every item, in their order; as many at a time as torch has threads. It may not depend on other items.

    torch releases Python's lock in its operations, so threads are enough. A single item has all of them.
    """
    items, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        return [work(item) for item in items]
    torch.set_num_threads(1)  # of every thread, and what a new one begins with
    try:
        return list(_pool(threads).map(work, items))
    finally:
        torch.set_num_threads(threads)


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "torch")
