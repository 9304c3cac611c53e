"""Which tokens, and which words of examples, a search means."""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from analysis.tokens import TOKEN_CLASSES, token_class
from trainer.config import require
from trainer.errors import one_line

_AROUND = 10  # tokens before and after a firing in which words of its example are looked for


class Tokens(NamedTuple):
    """Some tokens of a vocabulary: `Tokens(" of", "exact")`, `Tokens("digit", "class")`."""

    text: str
    by: Literal["word", "exact", "regex", "class"] = "word"
    """`word`: case and white space around it do not matter; `regex`: found anywhere in the token, as `re.search`
    does; `class`: a key of TOKEN_CLASSES"""

    @classmethod
    def typed(cls, text: str) -> "Tokens":
        """As one types it: a word, `" of"` exactly, `/\\d+/` a regular expression, or `any digit` for a class."""
        if text.startswith("any ") and text[4:] in TOKEN_CLASSES:
            return cls(text[4:], "class")
        bare = text.strip()
        inner = bare[1:-1]
        if inner and bare[0] == bare[-1] == '"':
            return cls(inner, "exact")
        if inner and bare[0] == bare[-1] == "/":
            return cls(inner, "regex")
        return cls(text)

    def among(self, strings: Mapping[int, str]) -> list[int]:
        """Ids of those meant, ascending.

        Raises:
            ValueError: it is no regular expression, or there is no such class.
        """
        if self.by == "regex":
            try:
                pattern = re.compile(self.text)
            except re.error as error:
                raise ValueError(one_line(f"{self.text!r} is no regular expression: {error}")) from error
            return sorted(i for i, text in strings.items() if pattern.search(text))
        if self.by == "class":
            known = self.text in TOKEN_CLASSES
            require(known, f"there is no class of tokens {self.text!r}: known are {', '.join(TOKEN_CLASSES)}")
            return sorted(i for i, text in strings.items() if token_class(text) == self.text)
        if self.by == "exact":
            return sorted(i for i, text in strings.items() if text == self.text)
        word = self.text.strip().lower()
        return sorted(i for i, text in strings.items() if text.strip().lower() == word)


def near_words(texts: list[str], words: str) -> np.ndarray:
    """At which positions of a context words stand within ten tokens [pos]; case does not matter.

    Args:
        texts: of the context's tokens [pos].
    """
    starts = np.cumsum([0, *map(len, texts)])
    near = np.zeros(len(texts), dtype=bool)
    for match in re.finditer(re.escape(words.lower()), "".join(texts).lower()):
        # Lower-casing keeps the length of almost any text; where not, the place is off by a letter.
        first, last = np.searchsorted(starts, [match.start(), match.end() - 1], "right") - 1
        near[max(0, first - _AROUND) : last + _AROUND + 1] = True
    return near
