"""Pictures as the components that draw them take them; `picture.js` and `picture.css` go before their own."""

import base64
from typing import Any

from analysis.picture import Picture


def encoded(picture: Picture) -> dict[str, Any]:
    """Of one that `draw` draws."""
    return {"size": picture.size, "values": as_text(picture.values)}


def as_text(values: bytes) -> str:
    """Of what `bytes` reads."""
    return base64.b64encode(values).decode()
