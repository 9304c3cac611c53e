"""Several processes of one training on this machine, as torchrun would start them, but forked: they import nothing."""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

from torch.distributed import TCPStore

from tests.helpers import PATIENCE
from trainer import ranks


def in_processes(n: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of n processes that have joined each other, in their order.

    What one raises is raised here, with its traceback as the text.
    """
    return _forked(n, _store(), {}, _joined, work, *arguments)


def commands(n: int, main: Callable[[list[str]], int], arguments: list[str], max_restarts: int = 0) -> list[list[int]]:
    """Exit statuses of a command in n processes, of every time that it is started: again where one fails."""
    store, statuses = _store(), []
    for attempt in range(max_restarts + 1):
        environment = {"TORCHELASTIC_RESTART_COUNT": attempt, "TORCHELASTIC_MAX_RESTARTS": max_restarts}
        statuses.append(_forked(n, store, environment, _exited, main, arguments))
        if not any(statuses[-1]):
            break
    return statuses


def _joined(work: Callable[..., Any], *arguments: Any) -> Any:
    with ranks.joined():
        return work(*arguments)


def _exited(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:  # of what the parser refuses
        return int(end.code or 0)


def _store() -> TCPStore:
    """Where they find each other; it outlives them, as that of torchrun does."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _forked(
    n: int, store: TCPStore, environment: dict[str, Any], work: Callable[..., Any], *arguments: Any
) -> list[Any]:
    context = multiprocessing.get_context("fork")
    pairs = [context.Pipe(duplex=False) for _ in range(n)]
    started = [
        context.Process(target=_run, args=(rank, n, store.port, environment, sender, work, arguments))
        for rank, (_, sender) in enumerate(pairs)
    ]
    for process in started:
        process.start()
    try:
        results = []
        for process, (receiver, sender) in zip(started, pairs, strict=True):
            sender.close()  # here: else a process that is killed would be waited for
            assert receiver.poll(PATIENCE), "a process hangs"
            try:
                results.append(pickle.loads(receiver.recv_bytes()))
            except EOFError:
                process.join()
                results.append((True, process.exitcode))
    finally:
        for process in started:
            process.kill()
            process.join()
    failed = [text for worked, text in results if not worked]
    assert not failed, "\n".join(failed)
    return [result for _, result in results]


def _run(
    rank: int,
    n: int,
    port: int,
    environment: dict[str, Any],
    sender: Any,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": True} | environment
    os.environ |= {name: str(value) for name, value in place.items()}
    try:
        sent = pickle.dumps((True, work(*arguments)))  # torch would send handles of memory that ends with the process
    except BaseException:
        sent = pickle.dumps((False, f"process {rank}: {traceback.format_exc()}"))
    sender.send_bytes(sent)
    os._exit(0)  # nothing of the test session is tidied up here
