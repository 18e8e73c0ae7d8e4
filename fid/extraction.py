"""One pass over a set of images: every net's features and moments, and the images' hash, by all processes together."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fid.distributed import World
from fid.features import FeatureNet, resolve_device
from fid.labelled import LabelledImages, image_digests
from fid.moments import Moments
from gspn_dit.errors import LocalUserError, UserError

SUMMED_LAYERS = ("features", "spatial")
WAITING_ROWS = 512
MAX_WORKERS = 8


@dataclass(frozen=True)
class Extraction:
    """What one net says about a set of images, in the set's own order."""

    features: Tensor
    """float32 [n, d] on the CPU; no rows but on the main process."""
    logits: Tensor | None
    """float32 [n, classes], where the extractor has them."""
    moments: dict[str, Moments] = field(repr=False)
    """Of all images, by layer ("features", "spatial"), on every process."""
    spatial: Tensor | None = None
    """float32 [n, d], where the extractor has them and they were to be kept."""


@dataclass(frozen=True)
class Features:
    """Features [n, d] and logits [n, classes] of n images, float32 on the CPU."""

    features: Tensor
    logits: Tensor


def extract_all(
    images: LabelledImages,
    nets: Sequence[FeatureNet],
    *,
    batch_size: int = 256,
    device: str = "cpu",
    world: World | None = None,
    title: str = "images",
    show_progress: bool = False,
    keep_spatial: bool = False,
) -> tuple[list[Extraction], str]:
    """Features of uint8 images by several nets in one pass, and the set's SHA-256.

    At most a few batches are in memory; the batches are the same for any number of processes.

    Args:
        keep_spatial: whether the rows of "spatial" are kept as well as their moments.

    Returns:
        One extraction per net, and `LabelledImages.sha256` ("" but on the main process).
    """
    from tqdm import tqdm

    world = world or World()
    place = resolve_device(device)
    passes = [_Pass(net, place, keep_spatial) for net in nets]
    digests: list[np.ndarray] = [np.zeros((0, 32), np.uint8)]
    bar = tqdm(total=len(images), desc=title, unit="image", disable=None if show_progress and world.is_main else True)
    own_batches = world.own(len(images), batch_size)
    if not own_batches:  # more processes than batches: this one sends no rows, but of the right width
        own_batches = [range(0)]
    with bar, _full_precision():
        for batch, pixels in _read_ahead(images, own_batches):
            digests.append(image_digests(pixels[: len(batch)]))
            tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).to(place)
            for step in passes:
                step.add(tensor, batch, images.source)
            bar.update(min(len(batch) * world.size, len(images) - bar.n))
    own = torch.from_numpy(np.concatenate(digests))
    gathered = world.gather(own, len(images), batch_size).numpy()
    found = [step.finish(world, len(images), batch_size) for step in passes]
    return found, images.hash_of(gathered) if world.is_main else ""


def extract(net: FeatureNet, pixels: np.ndarray, batch_size: int = 256, device: str = "cpu") -> Features:
    """Features of uint8 images [n, H, W, C] that fit the extractor; `extract_all` for one alone."""
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, not {batch_size}")
    (found,), _ = extract_all(LabelledImages(pixels, "the images"), [net], batch_size=batch_size, device=device)
    assert found.logits is not None, "a net with logits"
    return Features(found.features, found.logits)


class RunningMoments:
    """The moments of rows that come in batches; they wait until there are enough of them to be worth a product."""

    def __init__(self, dim: int) -> None:
        self.done = Moments.zeros(dim)
        self.waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Count rows [n, d]."""
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) >= WAITING_ROWS:
            self.finish()

    def finish(self) -> Moments:
        """The moments of all rows so far."""
        if self.waiting:
            self.done = self.done.merge(Moments.of(torch.cat(self.waiting)))
            self.waiting = []
        return self.done


class _Pass:
    """One net's share of a pass: what it has computed on this process so far."""

    def __init__(self, net: FeatureNet, place: torch.device, keep_spatial: bool) -> None:
        self.net = net
        self.extractor = net.extractor.to(place)
        self.rows: dict[str, list[Tensor]] = {layer: [] for layer in net.layers if layer != "spatial" or keep_spatial}
        self.sums: dict[str, RunningMoments] = {}

    @torch.no_grad()
    def add(self, images: Tensor, batch: range, source: str) -> None:
        """Features of the images of a batch; of an empty one only the layers' widths are learned."""
        if self.net.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        found = self.extractor.convert_features_tuple_to_dict(self.extractor(images))
        for layer, output in found.items():
            values = output.float().cpu()[: len(batch)]
            good = torch.isfinite(values).all(dim=1)
            if not good.all():
                bad = batch.start + int((~good).nonzero()[0])
                raise LocalUserError(f"the {layer} of image {bad} of {source} are NaN or infinite")
            if layer in self.rows:
                self.rows[layer].append(values)
            if layer in SUMMED_LAYERS:
                self.sums.setdefault(layer, RunningMoments(values.shape[1])).add(values)

    def finish(self, world: World, count: int, batch_size: int) -> Extraction:
        rows = {layer: world.gather(torch.cat(parts), count, batch_size) for layer, parts in self.rows.items()}
        moments = {layer: world.reduce(sums.finish()) for layer, sums in self.sums.items()}
        return Extraction(rows["features"], rows.get("logits"), moments, rows.get("spatial"))


def _read_ahead(images: LabelledImages, batches: list[range]) -> Iterator[tuple[range, np.ndarray]]:
    """The batches with their pixels, while threads read and decode the next ones; an array in memory needs none."""
    if isinstance(images.pixels, np.ndarray) and not isinstance(images.pixels, np.memmap):
        for batch in batches:
            yield batch, images.pixels[_rows(batch)]
        return

    def read(batch: range) -> np.ndarray:
        return np.array(images.pixels[_rows(batch)])

    workers = min(MAX_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[range, Future[np.ndarray]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(read, batch)))
            if len(waiting) > workers:
                ready, future = waiting.popleft()
                yield ready, future.result()
        for ready, future in waiting:
            yield ready, future.result()


def _rows(batch: range) -> slice:
    """The rows to read for a batch: the first image for an empty one."""
    return slice(batch.start, max(batch.stop, 1))


@contextmanager
def _full_precision() -> Iterator[None]:
    """Without TF32, which moves features, and which PyTorch turns on for convolutions by itself."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
