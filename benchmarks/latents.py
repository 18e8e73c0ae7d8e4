"""Shuffled reads of encoded latents, by storage, against a raw numpy.memmap in the same run.

    python -m benchmarks.latents --out benchmarks/results/latents.json

Synthetic moments of ImageNet's shape, float16 [8, 32, 32], are gathered in shuffled batches from: one raw file through
numpy.memmap (the baseline), the project's shards through `LatentSet`, and Arrow files through `datasets` as fixed-size
binaries and as arrays. The storages are read in turn, so that a busy neighbour hits all of them alike.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.output import publish
from gspn_dit.errors import ArgumentParser, run_cli

if TYPE_CHECKING:
    import numpy as np

    from gspn_dit.data.latent_shards import LatentSet

SHAPE = (8, 32, 32)
SIDES = 2  # an image as it is, and mirrored
CLASSES = 1000
SHARE_TARGET, RATE_TARGET = 0.6, 20_000
GROWTH_TARGET_BYTES = 64 << 20


def moments_of(start: int, stop: int) -> np.ndarray:
    """Moments of images [n, 2, 8, 32, 32] that tell one row from another, and cost little to make."""
    import numpy as np

    rows = np.arange(start * SIDES, stop * SIDES, dtype=np.uint32).reshape(-1, SIDES, 1, 1, 1)
    noise = np.arange(np.prod(SHAPE), dtype=np.uint32).reshape(SHAPE)
    return ((rows * 2654435761 + noise * 40503) % 2048).astype(np.float16) / 512 - 2


def write_raw(path: Path, images: int, piece: int) -> Callable[..., np.ndarray]:
    """One file of rows, gathered by numpy's own indexing of a memmap."""
    import numpy as np

    with open(path, "wb") as file:
        for start in range(0, images, piece):
            moments_of(start, min(start + piece, images)).tofile(file)
    rows = np.memmap(path, np.float16, "r", shape=(images * SIDES, *SHAPE))
    return lambda items, mirrored: rows[items * SIDES + mirrored]


def write_shards(directory: Path, images: int, piece: int) -> LatentSet:
    """What gspn_dit.prepare.encode leaves behind."""
    import numpy as np

    from gspn_dit.data.latent_shards import (
        FORMAT_VERSION,
        MANIFEST,
        Shard,
        open_latents,
        shard_bytes,
        shard_name,
        to_json,
    )

    directory.mkdir()
    entries = []
    for number, start in enumerate(range(0, images, piece)):
        indices = np.arange(start, min(start + piece, images))
        content = shard_bytes(moments_of(start, start + len(indices)), indices % CLASSES, indices, {})
        (directory / shard_name(number)).write_bytes(content)
        entries.append(Shard(directory / shard_name(number)).entry())
    names = [str(number) for number in range(CLASSES)]
    manifest = {"format_version": FORMAT_VERSION, "latent": {}, "class_names": names, "shards": entries}
    (directory / MANIFEST).write_bytes(to_json(manifest))
    return open_latents(directory, validation_fraction=0)


def write_arrow_binary(directory: Path, images: int, piece: int) -> Callable[..., np.ndarray]:
    """A column of binaries, one per row, in Arrow through datasets."""
    import numpy as np
    from datasets import Dataset, Features, Value, concatenate_datasets, load_from_disk

    features = Features({"moments": Value("binary")})
    for start in range(0, images, piece):
        rows = moments_of(start, min(start + piece, images)).reshape(-1, *SHAPE)
        part = Dataset.from_dict({"moments": [row.tobytes() for row in rows]}, features=features)
        part.save_to_disk(directory / str(start))
    parts = [load_from_disk(directory / str(start)) for start in range(0, images, piece)]
    table = concatenate_datasets(parts).with_format("arrow")

    def gather(items: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        column = table[items * SIDES + mirrored]["moments"]
        return np.stack([np.frombuffer(cell.as_buffer(), np.float16) for cell in column]).reshape(-1, *SHAPE)

    return gather


def write_arrow_arrays(directory: Path, images: int, piece: int) -> Callable[..., np.ndarray]:
    """A column of flat arrays in Arrow through datasets, formatted by it as numpy."""
    import numpy as np
    from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk

    features = Features({"moments": List(Value("float16"), length=int(np.prod(SHAPE)))})
    for start in range(0, images, piece):
        rows = moments_of(start, min(start + piece, images)).reshape(-1, int(np.prod(SHAPE)))
        Dataset.from_dict({"moments": list(rows)}, features=features).save_to_disk(directory / str(start))
    parts = [load_from_disk(directory / str(start)) for start in range(0, images, piece)]
    table = concatenate_datasets(parts).with_format("numpy")
    return lambda items, mirrored: np.asarray(table[items * SIDES + mirrored]["moments"]).reshape(-1, *SHAPE)


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs; what is mapped of files the system takes back at will."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("no RssAnon in /proc/self/status")


def check_equal(gathers: dict[str, Callable[..., np.ndarray]], images: int) -> None:
    """Refuse to time storages that do not hold the same."""
    import numpy as np

    chosen = np.random.default_rng(1).integers(0, images, 64)
    sides = chosen % 2
    expected = np.stack([moments_of(item, item + 1)[0, side] for item, side in zip(chosen, sides)])
    for name, gather in gathers.items():
        np.testing.assert_array_equal(gather(chosen, sides), expected, err_msg=name)


def measure(images: int, slow_images: int, batch_size: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Return samples per second by storage, and the growth of memory while all rows are read."""
    import numpy as np

    from benchmarks.measure import CpuDevice, software

    piece = 4096
    latents = write_shards(folder / "shards", images, piece)
    gathers: dict[str, Callable[..., np.ndarray]] = {
        "numpy.memmap": write_raw(folder / "raw", images, piece),
        "shards": latents.moments,
        "arrow binary": write_arrow_binary(folder / "binary", slow_images, piece),
        "arrow arrays": write_arrow_arrays(folder / "arrays", slow_images, piece),
    }
    check_equal(gathers, slow_images)
    sizes = {name: slow_images if name.startswith("arrow") else images for name in gathers}
    rates: dict[str, list[float]] = {name: [] for name in gathers}
    growth = []
    for number in range(rounds + 1):  # the first round fills the page cache
        for name, gather in gathers.items():
            generator = np.random.default_rng(number)
            items = generator.permutation(sizes[name])
            sides = generator.integers(0, SIDES, len(items))
            before, began = anonymous_bytes(), time.perf_counter()
            for start in range(0, len(items), batch_size):
                gather(items[start : start + batch_size], sides[start : start + batch_size])
            if number:
                rates[name].append(len(items) / (time.perf_counter() - began))
                if name == "shards":
                    growth.append(anonymous_bytes() - before)
    shares = [mine / raw for mine, raw in zip(rates["shards"], rates["numpy.memmap"])]
    rate = statistics.median(rates["shards"])
    return {
        "rows": {name: size * SIDES for name, size in sizes.items()},
        "row": {"shape": SHAPE, "dtype": "float16"},
        "batch_size": batch_size,
        "samples_per_second": {
            name: {"median": round(statistics.median(values)), "min": round(min(values)), "max": round(max(values))}
            for name, values in rates.items()
        },
        "share_of_memmap": {"median": statistics.median(shares), "min": min(shares), "max": max(shares)},
        "growth_of_memory_bytes": max(growth),
        "batches": of_batches(latents, batch_size),
        "targets": {"share_of_memmap": SHARE_TARGET, "samples_per_second": RATE_TARGET},
        "met": statistics.median(shares) >= SHARE_TARGET and rate >= RATE_TARGET and max(growth) < GROWTH_TARGET_BYTES,
        "machine": CpuDevice().describe(),
        "versions": software(),
    }


def of_batches(latents: LatentSet, batch_size: int) -> dict[str, Any]:
    """Return what a training batch costs: order, read, and the draw from the posterior by sample number."""
    import torch

    from gspn_dit.data.batches import draw_posterior
    from gspn_dit.data.latents import Latent
    from gspn_dit.rng import Stream, data_indices

    class Shape:
        has_posterior, channels, size = True, SHAPE[0] // 2, SHAPE[1]

    shape: Latent = Shape()  # type: ignore[assignment]
    seconds = []
    for step in range(9):
        numbers = range(step * batch_size, (step + 1) * batch_size)
        began = time.perf_counter()
        items = data_indices(0, numbers, len(latents))
        mean, log_variance = torch.from_numpy(latents.moments(items, items % 2)).float().chunk(2, dim=1)
        noise = draw_posterior(shape, 0, Stream.POSTERIOR, numbers)
        mean + torch.exp(0.5 * log_variance) * noise
        seconds.append(time.perf_counter() - began)
    return {"samples_per_second_with_posterior_draw": round(batch_size / statistics.median(seconds[1:]))}


def main() -> None:
    """Measure and write the JSON."""
    parser = ArgumentParser(prog="benchmarks.latents", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=51_200, help="each has two rows, as it is and mirrored")
    parser.add_argument("--arrow-images", type=int, default=8_192, help="the same for the slower storages")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the files go meanwhile (4 GB; default: the system's)")
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options.images, options.arrow_images, options.batch_size, options.rounds, Path(folder))
    publish(result, options.out)


if __name__ == "__main__":
    run_cli(main)
