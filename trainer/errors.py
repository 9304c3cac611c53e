"""What went wrong, on one line that every terminal, page and log can show."""


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's text, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return one_line(lines[0], most) if lines else type(error).__name__


def one_line(text: str, most: int = 480) -> str:
    """A text on one line: what cannot be shown is escaped, the middle of a long one left out."""
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    half = most // 2 - 3
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"
