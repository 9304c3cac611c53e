"""Several processes of one training on this machine, as torchrun would start them, but forked: they import nothing."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

from tests.helpers import PATIENCE
from trainer import ranks


def in_processes(n: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of n processes that have joined each other, in their order.

    What one raises is raised here, with its traceback as the text.
    """
    return _forked(n, _joined, work, *arguments)


def commands(n: int, main: Callable[[list[str]], int], arguments: list[str]) -> list[int]:
    """Exit statuses of a command in n processes."""
    return _forked(n, main, arguments)


def _joined(work: Callable[..., Any], *arguments: Any) -> Any:
    with ranks.joined():
        return work(*arguments)


def _forked(n: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pairs = [context.Pipe(duplex=False) for _ in range(n)]
    started = [
        context.Process(target=_run, args=(rank, n, port, sender, work, arguments))
        for rank, (_, sender) in enumerate(pairs)
    ]
    for process in started:
        process.start()
    try:
        results = []
        for receiver, sender in pairs:
            sender.close()  # here: else a process that is killed would be waited for
            assert receiver.poll(PATIENCE), "a process hangs"
            results.append(pickle.loads(receiver.recv_bytes()))
    finally:
        for process in started:
            process.kill()
            process.join()
    failed = [text for worked, text in results if not worked]
    assert not failed, "\n".join(failed)
    return [result for _, result in results]


def _run(rank: int, n: int, port: int, sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n}
    os.environ |= {name: str(value) for name, value in place.items()}
    try:
        sent = pickle.dumps((True, work(*arguments)))  # torch would send handles of memory that ends with the process
    except BaseException:
        sent = pickle.dumps((False, f"process {rank}: {traceback.format_exc()}"))
    sender.send_bytes(sent)
    os._exit(0)  # nothing of the test session is tidied up here
