"""What several people say about features, kept beside the checkpoint in `comments.sqlite`."""

import os
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import pandas as pd

from analysis.database import database
from trainer.config import require

_TABLE = (
    "CREATE TABLE comments (id INTEGER PRIMARY KEY, feature INTEGER NOT NULL, author TEXT NOT NULL, "
    "text TEXT NOT NULL, written REAL NOT NULL)"
)
AUTHOR, TEXT = 60, 5000  # characters at most


class Comment(NamedTuple):
    """What somebody said about a feature; `written` is a time in seconds."""

    id: int
    feature: int
    author: Annotated[str, msgspec.Meta(min_length=1, max_length=AUTHOR)]
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=TEXT)]
    written: Annotated[float, msgspec.Meta(ge=0, lt=2**33)]


class Comments:
    """The comments of one checkpoint. Names are what people say they are: nobody is asked for a password.

    Args:
        checkpoint: its directory; the file is made when the first comment is written.
    """

    def __init__(self, checkpoint: Path | str) -> None:
        self._file = Path(checkpoint) / "comments.sqlite"

    def all(self) -> list[Comment]:
        """Every comment, the oldest first.

        Raises:
            ValueError: the file is damaged, or another program's.
        """
        if not os.path.lexists(self._file):
            return []
        with database(self._file, _TABLE) as connection:
            rows = connection.execute("SELECT id, feature, author, text, written FROM comments ORDER BY id").fetchall()
            return msgspec.convert(rows, list[Comment])

    def table(self) -> pd.DataFrame:
        """Every comment: id, feature, author, text, written.

        Raises:
            ValueError: as `all`.
        """
        return pd.DataFrame(self.all(), columns=list(Comment._fields))

    def add(self, feature: int, author: str, text: str) -> None:
        """Say something.

        Raises:
            ValueError: a name or a text is missing or too long, or the file cannot be written.
        """
        author, text = author.strip(), text.strip()
        require(0 < len(author) <= AUTHOR, f"the name under a comment has 1 to {AUTHOR} characters")
        require(0 < len(text) <= TEXT, f"a comment has 1 to {TEXT:,} characters")
        with database(self._file, _TABLE) as connection:
            connection.execute(
                "INSERT INTO comments (feature, author, text, written) VALUES (?, ?, ?, ?)",
                (feature, author, text, time.time()),
            )

    def remove(self, id: int) -> None:
        """Take a comment away; one that is not there any more is no error.

        Raises:
            ValueError: the file cannot be written.
        """
        with database(self._file, _TABLE) as connection:
            connection.execute("DELETE FROM comments WHERE id = ?", (id,))
