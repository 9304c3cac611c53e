"""The button that copies the address of what is shown."""

from pages.components import component

_link = component(__file__)


def copy_link() -> None:
    """Once a page, near its top."""
    _link(key="copy_link")
