"""What the processes of one job tell each other under `torchrun`; in a single process each is the identity.

Gradients are written by hand here, so DistributedDataParallel has no backward pass to hook into: `reduced` is its
all-reduce, one flat one a step. Whatever every process decides by, it decides by a figure of the whole batch, so that
all decide the same and none is left waiting.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import torch as packed
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

_PATIENCE = timedelta(hours=1)  # that one process may be busy alone; one that dies is noticed at once

Item = TypeVar("Item")


class Lost(RuntimeError):
    """Another process of the job is gone."""


def asked() -> int:
    """Processes that torchrun started, before any of them has joined the others."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of those that torchrun started: gloo for what lies on a CPU, NCCL on GPUs.

    After an error nothing is tidied up: the others are to notice it when this process ends, and what it says to come
    first.
    """
    if asked() == 1:
        yield
        return
    with _heard():
        store, rank, n, *_ = next(rendezvous("env://", timeout=_PATIENCE))
        # torchrun may keep its store over a restart, and with it the addresses of those that are no more.
        dist.init_process_group(store=dist.PrefixStore(_attempt(), store), rank=rank, world_size=n, timeout=_PATIENCE)
    yield
    dist.destroy_process_group()


def size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    """Which of them this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the one that writes, logs and shows; so it is before it has joined the others, too."""
    return index() == 0 if dist.is_initialized() else int(os.environ.get("RANK", 0)) == 0


def by_first(method: Callable[..., None]) -> Callable[..., None]:
    """Of what writes files: done by the first process, and nothing in the others."""

    @wraps(method)
    def done(*args: Any, **kwargs: Any) -> None:
        if is_first():
            method(*args, **kwargs)

    return done


def own_device(name: str) -> str:
    """The device of this process: of several, each has a GPU of its own.

    Raises:
        ValueError: there are too few, one of them is named, or the device is of a kind that has no collectives.
    """
    if size() == 1:
        return name
    kind, _, number = name.partition(":")
    if number or kind not in ("cpu", "cuda"):
        raise ValueError(f"device {name} cannot be shared by {size()} processes: say cuda or cpu")
    if kind == "cpu":
        return name
    local, found = int(os.environ.get("LOCAL_RANK", index())), torch.cuda.device_count()
    if local >= found:
        raise ValueError(f"there are {found} GPUs here for more processes: lower --nproc_per_node")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def share(n: int) -> int:
    """How many of n tokens of a batch are this process's: as many as every other's.

    Raises:
        ValueError: they cannot be shared evenly.
    """
    if n % size():
        raise ValueError(f"batch_size {n} cannot be shared by {size()} processes: make it a multiple of {size()}")
    return n // size()


def parts(n: int) -> list[int]:
    """Where the part of each process begins in n things, and the end: parts differ by at most one."""
    return [n * each // size() for each in range(size() + 1)]


def reduced(means: Sequence[Tensor], sums: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Means of some tensors over all processes and sums of others, in one flat all-reduce; all of one type."""
    if size() == 1:
        return means, sums
    tensors = [*means, *sums]
    flat = torch.cat([each.reshape(-1) for each in tensors])
    with _heard():
        dist.all_reduce(flat)
    pieces = flat.split([each.numel() for each in tensors])
    shaped = [piece.view(each.shape) for piece, each in zip(pieces, tensors, strict=True)]
    for piece in shaped[: len(means)]:
        piece.div_(size())
    return shaped[: len(means)], shaped[len(means) :]


def mean(tensor: Tensor) -> Tensor:
    """Over all processes."""
    return reduced([tensor], [])[0][0]


def total(tensor: Tensor) -> Tensor:
    """Over all processes."""
    return reduced([], [tensor])[1][0]


def gathered(tensor: Tensor, dim: int = 0) -> Tensor:
    """The tensors of all processes, which have one shape, joined in their order along `dim`."""
    if size() == 1:
        return tensor
    tensor = tensor.contiguous()
    found = [torch.empty_like(tensor) for _ in range(size())]
    with _heard():
        dist.all_gather(found, tensor)
    return torch.cat(found, dim)


def exchanged(rows: Tensor, give: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """What the others have for this process, which gives row numbers `give[p]` of `rows` to process p.

    Args:
        counts: rows that come from each process.
    """
    received = rows.new_empty(sum(counts), *rows.shape[1:])
    with _heard():
        dist.all_to_all_single(received, rows[torch.cat(list(give))], list(counts), [len(each) for each in give])
    return received


def dealt(
    function: Callable[[Item], Tensor], items: Iterable[Item], shape: Sequence[int], like: Tensor
) -> list[Tensor]:
    """`function` of every item, each computed by one process and given to all.

    Args:
        shape: of a result.
        like: a tensor of its type and device.
    """
    if size() == 1:
        return [function(item) for item in items]
    items = list(items)
    results = like.new_zeros(len(items), *shape)
    for place in range(index(), len(items), size()):
        results[place] = function(items[place])
    return list(total(results))  # of zeros and one result: that result, exactly


def to_first(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """In the first process the tensors of each other one, which may differ in shape, one process after the other."""
    if not is_first():
        data = torch.frombuffer(bytearray(packed.save(tensors)), dtype=torch.uint8)
        with _heard():
            dist.send(torch.tensor(len(data)), 0)
            dist.send(data, 0)
        return
    for other in range(1, size()):
        length = torch.tensor(0)
        with _heard():
            dist.recv(length, other)
            data = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(data, other)
        yield packed.load(data.numpy().tobytes())


def copied(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of the first process: other processors may round otherwise."""
    if size() > 1:
        with _heard():
            for each in tensors:
                dist.broadcast(each, 0)


def decided(number: int) -> int:
    """What the first process says."""
    said = torch.tensor(number)
    copied([said])
    return int(said)


def any_of(flag: bool) -> bool:
    """Whether it holds in one of the processes. All of them wait for it."""
    return bool(total(torch.tensor(int(flag))))


def wait() -> None:
    """Until all are here."""
    any_of(False)


def may_restart() -> bool:
    """Whether torchrun starts the same command again where a process dies, or where machines come and go."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def says(sentence: str, if_alone: bool = False) -> bool:
    """Whether this process is to say something: what all have to say is said once.

    Args:
        if_alone: only where none of them has said anything.
    """
    if asked() == 1:
        return True
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
        said = dist.PrefixStore(f"{_attempt()} said", store)
        anything = said.add("anything", 1) > 1
        return not anything if if_alone else said.add(sentence, 1) == 1
    except (KeyError, ValueError, RuntimeError):  # who kept the record is gone
        return True


def _attempt() -> str:
    """Which start of the job this is."""
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


@contextmanager
def _heard() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Lost(
            "another process of this job ended, and all are needed: the same command with --resume (for a training "
            "--resume=true) goes on from what was saved last, as torchrun --max_restarts does by itself"
        ) from error
