"""Tokens as one reads them."""

import unicodedata


def visible(text: str) -> str:
    """A token with white space, control characters and what has no shape of its own made visible and harmless."""
    named = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}
    shown = []
    for before, c in zip(" " + text, text, strict=False):
        # A mark needs a letter to stand on; some printable characters are blank.
        bare = unicodedata.category(c)[0] == "M" and unicodedata.category(before)[0] not in "LM"
        blank = c in "\u034f\u115f\u1160\u2800\u3164\uffa0" or "\ufe00" <= c <= "\ufe0f"
        plain = c.isprintable() and not bare and not blank
        shown.append(named.get(c, c if plain else f"\\u{ord(c):04x}"))
    return "".join(shown) or "\u2205"
