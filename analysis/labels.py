"""Notes on features, kept beside the checkpoint in `labels.sqlite`, where several sessions may write at once."""

import io
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas as pd

_COLUMNS = ("feature", "label", "note", "changed")
_WAIT = 10  # seconds for which a write of another session is waited for


class Label(NamedTuple):
    """What somebody wrote about a feature; `changed` is a time in seconds, 0 where there is nothing yet."""

    label: str = ""
    note: str = ""
    changed: float = 0.0


class Labels:
    """The labels of one checkpoint.

    Args:
        checkpoint: its directory; the file is made when the first label is written.
    """

    def __init__(self, checkpoint: Path | str) -> None:
        self._file = Path(checkpoint) / "labels.sqlite"

    def get(self, feature: int) -> Label:
        """The label of a feature."""
        if not self._file.exists():
            return Label()
        with self._open() as connection:
            row = connection.execute("SELECT label, note, changed FROM labels WHERE feature = ?", (feature,)).fetchone()
        return Label(*row) if row else Label()

    def put(self, feature: int, label: str, note: str, seen: float) -> None:
        """Write a label; an empty one is removed.

        Args:
            seen: `changed` of the label that the writer saw.

        Raises:
            ValueError: somebody else has changed it since.
        """
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")  # nobody writes between the comparison and the change
            row = connection.execute("SELECT changed, label FROM labels WHERE feature = ?", (feature,)).fetchone()
            if (row[0] if row else 0.0) != seen:
                now = f"it is {row[1]!r} now" if row else "it is gone now"
                raise ValueError(f"the label of feature {feature} was changed in another session: {now}")
            if label.strip() or note.strip():
                values = (feature, label.strip(), note.strip(), time.time())
                connection.execute("INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?)", values)
            else:
                connection.execute("DELETE FROM labels WHERE feature = ?", (feature,))

    def table(self) -> pd.DataFrame:
        """Every label: feature, label, note, changed."""
        if not self._file.exists():
            return pd.DataFrame(columns=list(_COLUMNS))
        with self._open() as connection:
            rows = connection.execute("SELECT feature, label, note, changed FROM labels ORDER BY feature").fetchall()
        return pd.DataFrame(rows, columns=list(_COLUMNS))

    def load(self, text: str, d_sae: int) -> int:
        """Add labels from JSON (a list of records) or CSV, over those of the same features; returns how many.

        Raises:
            ValueError: the text is neither, or a record has no feature of this checkpoint.
        """
        try:
            records = json.loads(text) if text.lstrip().startswith("[") else _records(text)
            rows = [
                (int(each["feature"]), str(each.get("label") or ""), str(each.get("note") or ""), time.time())
                for each in records
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"labels are a JSON list or a CSV with a column feature, and label or note: {error}"
            ) from error
        wrong = [feature for feature, *_ in rows if not 0 <= feature < d_sae]
        if wrong:
            raise ValueError(f"there is no feature {wrong[0]}: ids run from 0 to {d_sae - 1}; nothing was imported")
        with self._open() as connection:
            connection.executemany("INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?)", rows)
        return len(rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for each use: threads of the app share none."""
        try:
            connection = sqlite3.connect(self._file, timeout=_WAIT)
            try:
                with connection:
                    connection.execute(
                        "CREATE TABLE IF NOT EXISTS labels "
                        "(feature INTEGER PRIMARY KEY, label TEXT NOT NULL, note TEXT NOT NULL, changed REAL NOT NULL)"
                    )
                    yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise ValueError(f"{self._file} cannot be used: {error}") from error


def _records(text: str) -> list[dict[str, str]]:
    table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    if "feature" not in table:
        raise ValueError(f"its columns are {', '.join(table)}")
    return table.to_dict("records")
