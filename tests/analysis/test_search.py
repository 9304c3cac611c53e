"""Which tokens and words a search means."""

import numpy as np
import pytest

from analysis.search import Tokens, near_words

STRINGS = dict(enumerate([" of", "of", " Of", " often", "12", " 7", ".", ' "', "\n", " War", " war"]))


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        (Tokens(" of"), [0, 1, 2]),
        (Tokens("OF "), [0, 1, 2]),
        (Tokens(" of", "exact"), [0]),
        (Tokens("of", "exact"), [1]),
        (Tokens("of", "regex"), [0, 1, 3]),
        (Tokens(r"^ ?\d+$", "regex"), [4, 5]),
        (Tokens("digit", "class"), [4, 5]),
        (Tokens("punctuation", "class"), [6, 7]),
        (Tokens("newline", "class"), [8]),
        (Tokens("capitalised", "class"), [2, 9]),
        (Tokens("function", "class"), [0]),
        (Tokens("content", "class"), [3, 10]),
    ],
)
def test_tokens(wanted, meant):
    assert wanted.among(STRINGS) == meant


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (" of", Tokens(" of")),
        ('" of"', Tokens(" of", "exact")),
        (r"/^\d+$/", Tokens(r"^\d+$", "regex")),
        ("any digit", Tokens("digit", "class")),
        ("any thing", Tokens("any thing")),
        ('"', Tokens('"')),
        ("//", Tokens("//")),
        ("/usr", Tokens("/usr")),
    ],
)
def test_tokens_as_they_are_typed(text, meant):
    assert Tokens.typed(text) == meant


@pytest.mark.parametrize("words", ["the war", "THE WAR", "e wa"])
def test_near_words(words):
    texts = ["<s>", *["x"] * 15, " the", " wa", "r", *["y"] * 15]
    last = 18 if words[0] != "e" else 17
    near = np.zeros(len(texts), dtype=bool)
    near[6 : last + 11] = True
    assert near_words(texts, words).tolist() == near.tolist()


def test_words_that_do_not_stand_there():
    assert not near_words(["a", "b"], "ba").any()
