"""How a benchmark hands over what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspn_dit.files import write_whole


def publish(result: Any, out: str | Path | None) -> None:
    """Print a result as JSON, and write it where a file is given, whose folder is made if need be."""
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        write_whole(Path(out), f"{text}\n".encode())
