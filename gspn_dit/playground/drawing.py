"""What the playground does when asked to draw: pictures while they form, and files to take away."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn_dit.errors import UserError
from gspn_dit.files import write_atomically
from gspn_dit.grid import class_grid, save_png, side_by_side
from gspn_dit.playground.sources import Settings, Source
from gspn_dit.playground.streaming import Pace, stream

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


def read_settings(
    subjects: Sequence[str] | str | None,
    per_subject: Any,
    seed: Any,
    guidance_scale: Any,
    steps: Any,
    height: Any = None,
    width: Any = None,
) -> Settings:
    """Return the settings that a form holds, checked: prompts one a line, sides of 0 for those of training.

    Raises UserError.
    """
    names = subjects.splitlines() if isinstance(subjects, str) else subjects or ()
    for name, value in (
        ("images of each", per_subject),
        ("seed", seed),
        ("guidance", guidance_scale),
        ("steps", steps),
    ):
        if value is None:
            raise UserError(f"{name} is empty; give a number")
    settings = Settings(
        tuple(name.strip() for name in names if name.strip()),
        int(per_subject),
        int(seed),
        float(guidance_scale),
        int(steps),
        *(int(side) if side else None for side in (height, width)),
    )
    settings.check()
    return settings


def drawings(sources: Sequence[Source], settings: Settings) -> Iterator[tuple[int, int, Image]]:
    """Yield (number of the source, steps done, grid) while each source draws in turn, the last of each complete.

    Raises UserError or ValueError where a source cannot draw them.
    """
    for number, source in enumerate(sources):
        for step, images in stream(partial(_draw, source, settings)):
            yield number, step, class_grid(images, settings.rows, settings.subjects)


def _draw(source: Source, settings: Settings, emit: Callable[[tuple[int, np.ndarray]], None]) -> None:
    pace = Pace()
    images = source.draw(settings, lambda step, decode: pace.show(lambda: emit((step, decode()))))
    emit((settings.steps, images))


def write_files(
    folder: Path, settings: Settings, sources: Sequence[Source], grids: Mapping[str, Image]
) -> tuple[Path, Path]:
    """Write grid.png, the grids side by side under their titles, and settings.json; return their paths.

    They lie in a new directory in `folder`, so that no two drawings mix.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    (only, *others) = grids.values()
    save_png(side_by_side(grids) if others else only, place / "grid.png")
    facts = {
        {"class": "classes", "prompt": "prompts"}[sources[0].subject]: settings.subjects,
        "images_of_each": settings.per_subject,
        "seed": settings.seed,
        "guidance_scale": settings.guidance_scale,
        "steps": settings.steps,
        "height": settings.height,
        "width": settings.width,
        "drawn_by": [source.describe(settings) for source in sources],
    }
    write_atomically(place / "settings.json", json.dumps(facts, indent=2, ensure_ascii=False).encode())
    return place / "grid.png", place / "settings.json"
