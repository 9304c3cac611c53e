"""Notes on features, kept beside the checkpoint in `labels.sqlite`, where several sessions may write at once."""

import csv
import io
import os
import sqlite3
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import pandas as pd

from analysis.database import database
from analysis.spreadsheet import unguarded
from trainer.config import require
from trainer.errors import one_line
from trainer.files import parse_json

_COLUMNS = ("feature", "label", "note", "changed")
_TABLE = (
    "CREATE TABLE labels (feature INTEGER PRIMARY KEY, label TEXT NOT NULL, note TEXT NOT NULL, changed REAL NOT NULL)"
)
_LENGTH = msgspec.Meta(max_length=2**16)


class Label(NamedTuple):
    """What somebody wrote about a feature; `changed` is a time in seconds, 0 where there is nothing yet."""

    label: str = ""
    note: str = ""
    changed: Annotated[float, msgspec.Meta(ge=0, lt=2**33)] = 0.0


class _Imported(msgspec.Struct):
    """A record of a file of labels; what it has besides is left out."""

    feature: int
    label: Annotated[str, _LENGTH] | None = None
    note: Annotated[str, _LENGTH] | None = None


class Labels:
    """The labels of one checkpoint.

    Args:
        checkpoint: its directory; the file is made when the first label is written.
    """

    def __init__(self, checkpoint: Path | str) -> None:
        self._file = Path(checkpoint) / "labels.sqlite"

    def get(self, feature: int) -> Label:
        """The label of a feature.

        Raises:
            ValueError: the file is damaged, or another program's.
        """
        if not os.path.lexists(self._file):
            return Label()
        with self._open() as connection:
            row = connection.execute("SELECT label, note, changed FROM labels WHERE feature = ?", (feature,)).fetchone()
            return msgspec.convert(row, Label) if row else Label()

    def put(self, feature: int, label: str, note: str, seen: float) -> None:
        """Write a label; an empty one is removed.

        Args:
            seen: `changed` of the label that the writer saw.

        Raises:
            ValueError: somebody else has changed it since, or the file cannot be written.
        """
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")  # nobody writes between the comparison and the change
            row = connection.execute("SELECT changed, label FROM labels WHERE feature = ?", (feature,)).fetchone()
            if (row[0] if row else 0.0) != seen:
                now = f"it is {row[1]!r} now" if row else "it is gone now"
                raise ValueError(one_line(f"the label of feature {feature} was changed in another session: {now}"))
            if label.strip() or note.strip():
                values = (feature, label.strip(), note.strip(), time.time())
                connection.execute("INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?)", values)
            else:
                connection.execute("DELETE FROM labels WHERE feature = ?", (feature,))

    def table(self) -> pd.DataFrame:
        """Every label: feature, label, note, changed.

        Raises:
            ValueError: as `get`.
        """
        if not os.path.lexists(self._file):
            return pd.DataFrame(columns=list(_COLUMNS))
        with self._open() as connection:
            rows = connection.execute("SELECT feature, label, note, changed FROM labels ORDER BY feature").fetchall()
            msgspec.convert([row[1:] for row in rows], list[Label])
        return pd.DataFrame(rows, columns=list(_COLUMNS))

    def load(self, data: bytes, d_sae: int) -> int:
        """Add labels from JSON (a list of records) or CSV, over those of the same features; returns how many.

        Args:
            data: the file, in UTF-8, or in UTF-16 with its mark.

        Raises:
            ValueError: it is neither, or a record has no feature of this checkpoint; nothing was imported.
        """
        try:
            text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
            is_json = text.lstrip().startswith("[")
            records = parse_json(text.encode(), list[dict[str, Any]]) if is_json else _records(text)
            found = msgspec.convert(records, list[_Imported], strict=is_json)
        except (ValueError, csv.Error) as error:
            what = "labels are a JSON list or a CSV with a column feature, and label or note"
            raise ValueError(one_line(f"{what}: {error}")) from error
        wrong = [each.feature for each in found if not 0 <= each.feature < d_sae]
        if wrong:
            raise ValueError(f"there is no feature {wrong[0]}: ids run from 0 to {d_sae - 1}; nothing was imported")
        now = time.time()
        rows = [(each.feature, each.label or "", each.note or "", now) for each in found]
        with self._open() as connection:
            connection.executemany("INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?)", rows)
        return len(rows)

    def _open(self) -> AbstractContextManager[sqlite3.Connection]:
        return database(self._file, _TABLE)


def _records(text: str) -> list[dict[str, str | None]]:
    """The rows of a CSV; a cell beyond its header is an error."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    records = list(reader)
    require("feature" in (reader.fieldnames or ()), f"its columns are {', '.join(reader.fieldnames or ())}")
    require(all(None not in record for record in records), "a row has more cells than the header")
    return [{name: cell and unguarded(cell) for name, cell in record.items()} for record in records]
