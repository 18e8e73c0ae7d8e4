"""Emoji by design and group: what `gspn_dit.prepare.emoji` wrote, as an image folder with a class for each pair.

    python -m gspn_dit.prepare.emoji_classes --data data/emoji --out data/emoji_classes

The classes are named "design, group", such as "noto, food-drink". Files are linked, not copied, where the disk can.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.files import cannot_hold
from gspn_dit.paths import path_argument

SPLITS = ("train", "validation")
CREDITS = "ATTRIBUTION.md"


def read_classes(data: Path) -> dict[Path, Path]:
    """Return, for each picture of a set, its path below the new folder. Raises UserError for what is no such set."""
    found = {}
    try:
        for split in SPLITS:
            for line in (data / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                source = data / split / row["file_name"]
                found[source] = Path(split, f"{row['style']}, {row['group']}", source.name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{data} is no set of python -m gspn_dit.prepare.emoji ({type(error).__name__}: {error}); make it with that"
        ) from None
    return found


def arrange(data: Path, out: Path) -> int:
    """Write the folder of a set and return its number of classes; it appears whole or not at all. Raises UserError."""
    if out.exists():
        raise UserError(f"--out {out} exists; give another name, or delete it")
    if problem := cannot_hold(out):
        raise UserError(f"--out {problem}")
    places = read_classes(data)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for source, place in places.items():
            target = partial / place
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:  # another disk, or one without links
                shutil.copyfile(source, target)
        if (data / CREDITS).is_file():
            shutil.copyfile(data / CREDITS, partial / CREDITS)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len({place.parts[1] for place in places.values()})


def main() -> None:
    """The command line."""
    parser = ArgumentParser(prog="python -m gspn_dit.prepare.emoji_classes", description="Emoji by design and group.")
    parser.add_argument("--data", required=True, type=path_argument, metavar="DIR", help="what prepare.emoji wrote")
    parser.add_argument("--out", required=True, type=path_argument, metavar="DIR", help="the image folder")
    options = parser.parse_args()
    print(f"{options.out}: {arrange(Path(options.data), Path(options.out))} classes")


if __name__ == "__main__":
    run_cli(main)
