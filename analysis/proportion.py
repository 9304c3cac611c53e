"""How far a share can be trusted."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_Z = 1.959964  # 95 % of a normal distribution lie within


def wilson(share: ArrayLike, n: ArrayLike) -> tuple[Any, Any]:
    """95 % interval of proportions (Wilson 1927), elementwise; nan where n is 0 or the share nan.

    Args:
        n: observations behind each share; need not be whole.
    """
    share, n = np.asarray(share, float), np.asarray(n, float)
    n = np.where(n > 0, n, np.nan)
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * (share * (1 - share) / n + _Z**2 / (4 * n**2)) ** 0.5
    return middle - half, middle + half
