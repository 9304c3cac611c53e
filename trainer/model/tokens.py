"""Text to token ids: what text spells is text, also where it spells a special token."""

from typing import Any


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without BOS and EOS; half a character (a lone surrogate) becomes U+FFFD.

    Args:
        tokenizer: of transformers, fast or slow.
    """
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
