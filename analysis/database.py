"""A small SQLite file beside a checkpoint, in which several sessions may write at once."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from trainer.errors import one_line
from trainer.files import require_file

_WAIT = 3  # seconds for which a write of another session is waited for


@contextmanager
def database(file: Path, table: str) -> Iterator[sqlite3.Connection]:
    """A connection of its own for each use: threads of the app share none. What is written is kept at the end.

    Args:
        table: the `CREATE TABLE` of its one table, which is made where it is not there yet.

    Raises:
        ValueError: the file is damaged, in use or another program's, or what is read from it cannot be used.
    """
    try:
        if os.path.lexists(file):
            require_file(file)
        connection = sqlite3.connect(file, timeout=_WAIT)
        try:
            with connection:
                # A view or a trigger of somebody else's would run here.
                made = [sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")]
                if made not in ([], [table]):
                    raise sqlite3.DatabaseError("it is another program's database")
                connection.execute(table.replace("TABLE", "TABLE IF NOT EXISTS"))
                yield connection
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        busy = error.args and "locked" in error.args[0]
        why = f"is in use by another program for over {_WAIT} s: try again" if busy else f"cannot be used: {error}"
        raise ValueError(one_line(f"{file} {why}")) from error
    # SQLite quotes a damaged file in its message, bytes that are no text included.
    except (sqlite3.Error, OSError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ValueError(one_line(f"{file} cannot be used: {error}")) from error
