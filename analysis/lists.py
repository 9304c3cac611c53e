"""Named lists of features, kept beside the checkpoint in `lists.sqlite`."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec

from analysis.database import database
from trainer.config import require

_TABLE = (
    "CREATE TABLE lists (feature INTEGER NOT NULL, name TEXT NOT NULL, added REAL NOT NULL, "
    "PRIMARY KEY (feature, name))"
)
_Row = tuple[int, Annotated[str, msgspec.Meta(min_length=1, max_length=100)]]


class Lists:
    """The lists of one checkpoint.

    Args:
        checkpoint: its directory; the file is made when the first feature is put on a list.
    """

    def __init__(self, checkpoint: Path | str) -> None:
        self._file = Path(checkpoint) / "lists.sqlite"

    def all(self) -> dict[str, list[int]]:
        """The features of every list, in the order in which they were put there.

        Raises:
            ValueError: the file is damaged, or another program's.
        """
        if not os.path.lexists(self._file):
            return {}
        lists: dict[str, list[int]] = {}
        with database(self._file, _TABLE) as connection:
            rows = connection.execute("SELECT feature, name FROM lists ORDER BY added, feature").fetchall()
            for feature, name in msgspec.convert(rows, list[_Row]):
                lists.setdefault(name, []).append(feature)
        return lists

    def put(self, feature: int, names: Iterable[str]) -> None:
        """Put a feature on these lists, and take it off all others.

        Raises:
            ValueError: a name is empty or longer than 100 characters, or the file cannot be written.
        """
        wanted = {name.strip() for name in names}
        require(all(0 < len(name) <= 100 for name in wanted), "the name of a list has 1 to 100 characters")
        with database(self._file, _TABLE) as connection:
            connection.execute("BEGIN IMMEDIATE")
            rows = connection.execute("SELECT name FROM lists WHERE feature = ?", (feature,)).fetchall()
            before = {name for (name,) in rows}
            gone = [(feature, name) for name in before - wanted]
            connection.executemany("DELETE FROM lists WHERE feature = ? AND name = ?", gone)
            new = [(feature, name, time.time()) for name in sorted(wanted - before)]
            connection.executemany("INSERT INTO lists VALUES (?, ?, ?)", new)
