"""How a benchmark hands over what it found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspn_dit.files import write_whole


def publish(result: Any, out: str | Path | None, shown: Sequence[str] | None = None) -> None:
    """Print a result as JSON, and write it where a file is given, whose folder is made if need be.

    Args:
        result: JSON values.
        out: the file.
        shown: keys that are printed of a long result, where it has them; None: all of it is.
    """
    if out is not None:
        write_whole(Path(out), f"{json.dumps(result, indent=2)}\n".encode())
    told = result if shown is None else {key: result[key] for key in shown if key in result}
    print(json.dumps(told, indent=2))
