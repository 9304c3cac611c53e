"""Tokens in a row, each coloured by a value, as HTML. All text is escaped here; `st.html` sanitises once more."""

import html
from collections.abc import Sequence

from analysis.tokens import visible

# Okabe and Ito's orange, green, vermillion and sky blue: told apart with every common colour vision, on light and dark.
ORANGE, GREEN, RED, BLUE = "230,159,0", "0,158,115", "213,94,0", "86,180,233"


def spaced(text: str) -> str:
    """A token as `visible` has it, in running text: blanks are blanks."""
    return visible(text).replace("\u00b7", " ")


def strip(
    texts: Sequence[str],
    values: Sequence[float],
    title: str,
    colour: str = ORANGE,
    marked: int | None = None,
    span: tuple[int, int] | None = None,
) -> str:
    """One line per token with its value as background; negative values are vermillion.

    Args:
        title: in words what a value is; shown before the tokens and in each token's tooltip.
        marked: position that is underlined: where the feature fires.
        span: first and last position shown; default all.
    """
    first, last = span or (0, len(texts) - 1)
    largest = max((abs(v) for v in values), default=0) or 1
    cells = []
    for position in range(max(0, first), min(last, len(texts) - 1) + 1):
        value = float(values[position])
        shade = f"rgba({colour if value >= 0 else RED},{0.75 * abs(value) / largest:.3f})"
        line = "border-bottom:2px solid currentColor;font-weight:600;" if position == marked else ""
        tip = html.escape(f"{position}: {visible(texts[position])} · {title} {value:.3g}", quote=True)
        text = html.escape(spaced(texts[position]))
        cells.append(f'<span title="{tip}" style="background:{shade};{line}white-space:pre-wrap">{text}</span>')
    before, after = ("… " if first > 0 else ""), (" …" if last < len(texts) - 1 else "")
    label = f'<span style="opacity:.65;font-size:.75rem">{html.escape(title)}</span>'
    tokens = "".join(cells)
    # Right-to-left text and marks stay inside their own token.
    return (
        f'<div style="line-height:1.5;overflow-wrap:anywhere">{label}<br>'
        f'<bdo dir="ltr" style="font-family:monospace;font-size:.82rem">{before}{tokens}{after}</bdo></div>'
    )


def around(position: int, source: int, length: int, before: int = 40, after: int = 12) -> tuple[int, int]:
    """The part of a context to show around a position, with the source that matters most to it."""
    return max(0, min(position - before, source - 3)), min(length - 1, position + after)
