"""Marks in a stream, so that a run that goes on does not tokenise again what it has read.

A mark says in which record a context begins, and is kept with a hash of that context. It is a shortcut, no more: where
marks are lost, damaged or of another text, the stream is read from its beginning, and they are written anew.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
from jaxtyping import Int
from torch import Tensor

from trainer.data.documents import hash_fraction
from trainer.files import read_json, write_json

if TYPE_CHECKING:
    from trainer.data.text import Context

_EVERY = 1024  # contexts
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Mark(NamedTuple):
    record: Count
    used: Count
    """tokens of that record that are of earlier contexts"""
    check: float


def read_on(path: Path, start: int, packed: "Callable[[int, int], Iterator[Context]]") -> Iterator[Int[Tensor, " pos"]]:
    """The contexts of a stream from the `start`-th on, exactly as if all had been read; those before it are skipped.

    Args:
        path: file of the marks.
        packed: contexts that begin in a record, after so many of its tokens.
    """
    marks = _read(path)
    at = max((number for number in marks if 0 < number <= start), default=0)
    record, used, check = marks[at] if at else Mark(0, 0, 0.0)
    contexts = packed(record, used)
    if at:
        first = list(islice(contexts, 1))
        contexts = chain(first, contexts)
        if [_check(at, record, used, context) for context in first] != [check]:
            marks, at, record, used, contexts = {}, 0, 0, 0, packed(0, 0)
    for number, context in enumerate(contexts, at):
        if number and number % _EVERY == 0:
            mark = Mark(record, used, _check(number, record, used, context))
            if marks.get(number) != mark:
                marks[number] = mark
                with suppress(OSError):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, marks)
        if number >= start:
            yield context.tokens
        # The next one begins in the record in which this one ends, or after its last token: that is the same.
        owners = context.documents[1:]
        before = used if owners[-1] == record else 0
        record, used = int(owners[-1]), before + int((owners == owners[-1]).sum())


def _check(number: int, record: int, used: int, context: "Context") -> float:
    return hash_fraction([number, record, used, *context.tokens.tolist()])


def _read(path: Path) -> dict[int, Mark]:
    try:
        return read_json(path, dict[Count, Mark])
    except (FileNotFoundError, ValueError):
        return {}
