"""Rows that processes have read to the batches that they train on."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer import ranks


def deal(
    rows: Float[Tensor, "row layer head d_head"], order: Int[Tensor, " of_all"], parts: list[int], batch_size: int
) -> tuple[Float[Tensor, "_ layer head d_head"], Int[Tensor, " _"]]:
    """This process's share of every batch of a group of rows, of which each process has read a part.

    The batches are those of a single process, `order` cut after every `batch_size` rows, and of each the first process
    takes the first rows: so no row is read twice or left out when a run goes on with another number of processes. It
    costs that all rows but one in `ranks.size()` go to another process once, as they are kept (float16).

    Args:
        rows: of this process's part.
        order: of the rows of the group.
        parts: numbers of the first rows of every process's part, and of the end.

    Returns:
        Rows, and the order in which they are batches of `batch_size // ranks.size()`.
    """
    n = ranks.size()
    if n == 1:
        return rows, order
    whole = order[: len(order) // batch_size * batch_size].view(-1, n, batch_size // n)
    wanted = [whole[:, process].flatten() for process in range(n)]
    first, end = parts[ranks.index() : ranks.index() + 2]
    give = [each[(each >= first) & (each < end)] - first for each in wanted]
    owner = torch.searchsorted(torch.tensor(parts[1:], device=order.device), wanted[ranks.index()], right=True)
    received = ranks.exchanged(rows, give, owner.bincount(minlength=n).tolist())
    return received, owner.argsort(stable=True).argsort()  # they come by owner, and of each as they are wanted
