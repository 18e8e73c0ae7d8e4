"""Files that are whole whenever they exist."""

from __future__ import annotations

from pathlib import Path

from gspn_dit.files import write_atomically


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` so that `path` is never half of it, making its directory where it is missing.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
