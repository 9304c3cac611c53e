"""Tokens as one reads them, and the class of token that each is."""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

# In order of precedence, by the text of a token alone; where a sentence starts depends on what precedes.
TOKEN_CLASSES = {
    "punctuation": "punctuation and symbols only",
    "newline": "white space with a line break",
    "digit": "a number: digits and no letter",
    "capitalised": "begins with a capital letter",
    "function": "an English function word, after white space",
    "content": "another word, after white space or in a script without capitals",
}
# English closed-class words: determiners, pronouns, prepositions, conjunctions, auxiliaries and particles.
_FUNCTION_WORDS = """
    a about above across after against all along also although am among an and another any are around as at be
    because been before behind being below beneath beside between beyond both but by can could despite did do does
    doing down during each either else even every few for from had has have having he her here hers herself him
    himself his how however i if in inside into is it its itself just least less like many may me might mine more
    most much must my myself near neither no nor not of off on once one only onto or other others ought our ours
    ourselves out outside over own per rather same shall she should since so some such than that the their theirs
    them themselves then there therefore these they this those though through throughout thus till to too toward
    towards under unless until unto up upon us very via was we were what whatever when where whereas whether which
    while who whom whose why will with within without would yet you your yours yourself yourselves
"""
_IS_FUNCTION_WORD = frozenset(_FUNCTION_WORDS.split()).__contains__
_ENDS_SENTENCE = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"')\]}\u201d\u2019\u00bb]*\s*$")
_BYTE = re.compile("<(?:0x)?([89A-F][0-9A-F])>|(.)", re.DOTALL)
CONTINUES = "\u203f"  # a tie: the rest of the character before it
_TRANSPARENT = re.compile(r"[\s\"'()\[\]{}\u201c\u201d\u2018\u2019\u00ab\u00bb]*$")


@cache
def token_class(text: str) -> str | None:
    """Key of TOKEN_CLASSES; None for pieces of words and for blanks without a line break.

    Where a tokenizer has no space in the text of its tokens, lower-case words cannot be told from pieces of words.
    """
    bare = text.strip()
    if not bare:
        return "newline" if "\n" in text or "\r" in text else None
    if all(unicodedata.category(c)[0] in "PS" for c in bare):
        return "punctuation"
    if any(map(str.isnumeric, bare)) and not any(map(str.isalpha, bare)):
        return "digit"
    if bare[0].isupper() or bare[0].istitle():
        return "capitalised"
    if text[0].isspace() and _IS_FUNCTION_WORD(bare.lower()):
        return "function"
    caseless = bare[0].isalpha() and not bare[0].islower()
    return "content" if caseless or (text[0].isspace() and bare[0].isalpha()) else None


def ends_sentence(text: str) -> bool:
    """Whether a token ends in a full stop, an exclamation or a question mark; also one of an abbreviation."""
    return _ENDS_SENTENCE.search(text) is not None


def is_transparent(text: str) -> bool:
    """Whether a token only stands between a sentence's end and the next one's start: white space, quotes, brackets."""
    return _TRANSPARENT.match(text) is not None


def may_start_sentence(text: str) -> bool:
    """Whether a token begins with a letter that is not lower case."""
    return text.strip()[:1].isalpha() and not text.strip()[0].islower()


def labels(tokens: Sequence[str]) -> list[str]:
    """`position: token`, unique within a text and readable; of a part of a character, the whole and ties.

    Args:
        tokens: from `in_text`.
    """
    found, whole = [], ""
    for position, text in enumerate(tokens):
        whole = whole + text if text.startswith(CONTINUES) and position else text
        found.append(f"{position}: {visible(whole)}")
    return found


def in_text(tokens: Sequence[str]) -> list[str]:
    """Tokens that follow each other, as one reads them: bytes that make a character together are that character.

    It stands where its first byte is, and a tie in each later token that has a part of it. What makes no character
    (UTF-8) stays as it is.

    Args:
        tokens: each as it is read alone, with `<E4>` or `<0xE4>` for a byte (`LanguageModel.token_strings`).
    """
    units: list[tuple[int, str | None, str]] = [
        (at, found[1], found[2] or "") for at, token in enumerate(tokens) for found in _BYTE.finditer(token)
    ]
    shown, i = [""] * len(tokens), 0
    while i < len(units):
        at, byte, plain = units[i]
        character, size = plain, 1
        if byte:
            size = max(1, 8 - (int(byte, 16) ^ 0xFF).bit_length())  # as many leading ones as the character has bytes
            parts = [part or "" for _, part, _ in units[i : i + size]]
            try:
                character = bytes.fromhex("".join(parts)).decode() if all(parts) else ""
            except UnicodeDecodeError:
                character = ""
            if not character:
                character, size = f"<{byte}>", 1
        shown[at] += character
        for later in sorted({unit[0] for unit in units[i : i + size]} - {at}):
            shown[later] += CONTINUES
        i += size
    return shown


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
