"""What other libraries say went wrong, in one line."""


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's text, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__
