"""Room on a disk and in memory, asked for before work begins."""

import shutil
from pathlib import Path


def require_disk(folder: Path, needed: float, way_out: str) -> None:
    """Raise ValueError unless so many bytes are free where a folder is or will be."""
    require_room(needed, free_disk(folder), f"of disk in {folder}", way_out)


def free_disk(folder: Path) -> int:
    """Bytes where a folder is or will be."""
    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.exists())).free


def require_room(needed: float, free: float, of_what: str, way_out: str) -> None:
    """Raise ValueError unless so many of the bytes are free."""
    if needed > free:
        raise ValueError(f"this takes about {gb(needed)} {of_what} and {gb(free)} are free: {way_out}")


def gb(size: float) -> str:
    """Bytes as one reads them."""
    return f"{size / 1e9:.{0 if size > 1e10 else 1}f} GB" if size >= 5e7 else f"{size / 1e6:.0f} MB"
