"""Texts in a CSV that a spreadsheet opens: none is a formula, and each comes back as it was."""

from typing import Any

import pandas as pd

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # also of full width


def guarded(table: pd.DataFrame) -> pd.DataFrame:
    """A table in which a spreadsheet finds no formula: a text that looks like one begins with an apostrophe."""
    texts = table.select_dtypes(exclude=["number", "bool"])
    return table.assign(**{str(name): texts[name].map(_guard) for name in texts})


def unguarded(text: str) -> str:
    """The text of a cell as it was before `guarded`."""
    return text[1:] if text.startswith("'") and _looks_like_formula(text) else text


def _guard(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and _looks_like_formula(cell) else cell


def _looks_like_formula(text: str) -> bool:
    return text.lstrip(" '").startswith(_FORMULA)  # an apostrophe too, so that `unguarded` takes away only ours
