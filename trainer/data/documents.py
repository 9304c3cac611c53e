"""Records to documents: the text or the token ids that a record holds."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

Document = str | list[int]
INPUT_IDS = "input_ids"
_WITHOUT_COLUMN = 1000  # records at the beginning that may lack the column before it counts as misnamed


def documents(
    records: Iterable[Any], column: str, source: str, n_ids: int, start: int = 0
) -> Iterator[Document | None]:
    """The document of each record; None where it holds none (null, empty, blank).

    A record is a text, or a dict that holds one under `column`. Where it has no such column, it may hold token ids
    under `input_ids`.

    Args:
        source: where the records come from, for messages.
        n_ids: token ids below it are valid.
        start: records that were left out at the beginning, among them one with a document.

    Raises:
        ValueError: no record has the column, or one holds something else than text or valid ids.
    """
    others: dict[str, None] = {}  # columns of records without the one asked for, in their order
    found = start > 0
    for number, record in enumerate(records, start + 1):
        name, value = "", record
        if isinstance(record, dict):
            name = column if column in record else INPUT_IDS
            value = record.get(name)
            if name in record:
                found = True
            else:
                others |= dict.fromkeys(map(str, record))
        if others and not found and number >= _WITHOUT_COLUMN:
            break
        yield _document(value, name == INPUT_IDS, f"record {number:,} of {source}", n_ids)
    if others and not found:
        shown = ", ".join(name[:40] for name in list(others)[:20])
        raise ValueError(
            f"{source} has no column {column!r}; it has {shown}: name the one with the text: --text_column"
        )


def hash_fraction(document: Document) -> float:
    """A number in [0, 1) that depends on the document alone."""
    content = document.encode("utf-8", "replace") if isinstance(document, str) else np.array(document, "<i8").tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def _document(value: Any, is_ids: bool, where: str, n_ids: int) -> Document | None:
    if value is None or value != value or (is_ids and value == []):  # NaN is how tables write null
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    if is_ids and isinstance(value, list) and all(type(each) is int for each in value):
        if not 0 <= min(value) <= max(value) < n_ids:
            raise ValueError(
                f"{where} holds token ids from {min(value)} to {max(value)}, but the tokenizer has 0 to {n_ids - 1}: "
                "it was tokenised for another model"
            )
        return value
    raise ValueError(f"{where} holds no text but {type(value).__name__}: {repr(value)[:60]}")
