"""Every token can be seen."""

import pytest

from analysis.tokens import in_text, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "\u00b7the"),
        ("\n\t", "\u21b5\u21e5"),
        ("\u202eevil", "\\u202eevil"),
        ("\ufe0f", "\\ufe0f"),
        ("\u0301", "\\u0301"),
        ("e\u0301", "e\u0301"),
        ("\u0915\u093f\u0902", "\u0915\u093f\u0902"),
        ("\u3164\u2800", "\\u3164\\u2800"),
        ("", "\u2205"),
    ],
)
def test_every_token_can_be_seen(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        (["<E4><BD>", "<A0>", "<E5>", "<A5>", "<BD>!"], ["\u4f60", "\u203f", "\u597d", "\u203f", "\u203f!"]),
        ([" <E4><BD>", "<A0><E5>", "<A5><BD>"], [" \u4f60", "\u203f\u597d", "\u203f"]),
        ([" <F0><9F>", "<98>", "<80>"], [" \U0001f600", "\u203f", "\u203f"]),
        (["<0xE4>", "<0xBD>", "<0xA0>"], ["\u4f60", "\u203f", "\u203f"]),  # SentencePiece
        (["<E4><BD><A0><E5>", "a"], ["\u4f60<E5>", "a"]),
        (["<A0>", "<E4>", "<BD>", "b<E4>"], ["<A0>", "<E4>", "<BD>", "b<E4>"]),
        (["<E4>", " ", "<BD>", "<A0>"], ["<E4>", " ", "<BD>", "<A0>"]),
        (["<ED><A0>", "<80>"], ["<ED><A0>", "<80>"]),  # half of a surrogate pair
        (["<50300>", "<E", "4>", "a<b>\n"], ["<50300>", "<E", "4>", "a<b>\n"]),
        ([], []),
    ],
)
def test_bytes_of_a_character_are_read_as_the_character(tokens, shown):
    assert in_text(tokens) == shown
