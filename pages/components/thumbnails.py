"""Small pictures side by side."""

from analysis.picture import Picture
from pages.components import component
from pages.components.picture import encoded

_thumbnails = component(__file__, "picture")


def thumbnails(pictures: dict[str, Picture], of: str, key: str) -> None:
    """Pictures, each with its name below.

    Args:
        pictures: by name.
        of: what they are of: whoever does not see them is told this and the name.
        key: of the component in the session.
    """
    drawn = [
        {"picture": encoded(picture), "label": f"{of} on {name}", "below": name} for name, picture in pictures.items()
    ]
    _thumbnails(key=key, data={"pictures": drawn})
