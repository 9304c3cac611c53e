"""Every token can be seen."""

import pytest

from analysis.tokens import visible


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
