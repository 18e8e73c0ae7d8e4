"""What one process of an encoding does: decode images, run the autoencoder, and put its moments into shards."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from gspn_dit.data.images import ImageSet, decode_cell
from gspn_dit.data.latent_shards import shard_bytes
from gspn_dit.errors import LocalUserError, UserError


class Encodes(Protocol):
    """What turns images into what is stored of them: the latents of an autoencoder, or features."""

    place: str
    """How messages call it."""
    size: int
    """Rows and columns of what is stored."""

    @property
    def moment_channels(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def to(self, device: torch.device) -> Encodes:
        """Move to a device, in place; return itself."""

    def moments(self, images: np.ndarray, batch_size: int) -> torch.Tensor:
        """Return float32 [n, moment_channels, size, size] on the CPU of uint8 images [n, H, W, C]."""


class Encoder:
    """Encodes shards in one process.

    On a CPU a batch is computed by one thread, and several at once: how many threads share a sum decides its rounding.
    """

    def __init__(self, images: ImageSet, latent: Encodes, options: argparse.Namespace) -> None:
        self.images, self.latent, self.options = images, latent, options
        self.skipped = 0
        """Images that this process has left out."""
        self.on_cpu = latent.device.type == "cpu"
        self.batches_at_once = torch.get_num_threads() if self.on_cpu else 1

    @contextlib.contextmanager
    def _computing(self) -> Iterator[ThreadPoolExecutor]:
        """Yield the threads that run the autoencoder."""
        threads = torch.get_num_threads()
        start = functools.partial(torch.set_num_threads, 1) if self.on_cpu else None
        try:
            with ThreadPoolExecutor(self.batches_at_once, initializer=start) as pool:
                yield pool
        finally:
            torch.set_num_threads(threads)

    def encode(self, number: int) -> bytes:
        """Return the content of a shard; raises LocalUserError for an image that cannot be read and is one too many."""
        size, batch_size = self.options.shard_images, self.options.batch_size
        rows = range(number * size, min((number + 1) * size, len(self.images)))
        kept, skipped = [], []
        converted: Counter[str] = Counter()
        batch: list[np.ndarray] = []
        moments: list[Future[np.ndarray]] = []
        with ThreadPoolExecutor(self.options.workers) as decoding, self._computing() as computing:
            for row, decoded in self._decoded(rows, decoding):
                if isinstance(decoded, UserError):
                    skipped.append(str(decoded))
                    self.count_skipped(1, decoded)
                    continue
                pixels, mode = decoded
                kept.append(row)
                batch.append(pixels)
                if mode != ("L" if pixels.shape[2] == 1 else "RGB"):
                    converted[mode] += 1
                if len(batch) == batch_size:
                    moments.append(computing.submit(self._moments, np.stack(batch)))
                    batch = []
                    if len(moments) > self.batches_at_once:  # images shall not pile up
                        moments[-1 - self.batches_at_once].result()
            if batch:
                moments.append(computing.submit(self._moments, np.stack(batch)))
        shape = (0, 2, self.latent.moment_channels, self.latent.size, self.latent.size)
        return shard_bytes(
            np.concatenate([part.result() for part in moments]) if moments else np.empty(shape, np.float16),
            self.images.labels[kept],
            np.array(kept, dtype=np.int64),
            {"skipped": skipped, "converted": dict(sorted(converted.items()))},
        )

    def _decoded(
        self, rows: range, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[int, tuple[np.ndarray, str] | UserError]]:
        """Yield each row and its pixels and mode, or what is wrong with it; threads decode the next ones meanwhile."""
        waiting: deque[tuple[int, Future[tuple[np.ndarray, str] | UserError]]] = deque()
        ahead = self.options.batch_size
        for start in range(0, len(rows), ahead):
            chunk = rows[start : start + ahead]
            cells = self.images.cells(chunk)
            waiting.extend((row, pool.submit(self._decode, cell, row)) for row, cell in zip(chunk, cells))
            while len(waiting) > ahead:
                row, future = waiting.popleft()
                yield row, future.result()
        for row, future in waiting:
            yield row, future.result()

    def _decode(self, cell: dict[str, Any] | None, row: int) -> tuple[np.ndarray, str] | UserError:
        try:
            return decode_cell(cell, row, self.images.image_size, self.images.channels, crop=True)
        except UserError as error:
            return error

    def _moments(self, pixels: np.ndarray) -> np.ndarray:
        """Encode images and their mirror images, float16 [n, 2, channels, h, w]."""
        device = self.latent.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.options.precision == "bf16"):
            both = [self.latent.moments(side, len(pixels)).numpy() for side in (pixels, pixels[:, :, ::-1])]
        with np.errstate(over="ignore"):
            moments = np.stack(both, axis=1).astype(np.float16)
        if not np.isfinite(moments).all():
            raise LocalUserError(f"{self.latent.place} encodes images to values that float16 cannot hold")
        return moments

    def count_skipped(self, count: int, error: UserError | str) -> None:
        """Count images that are left out; raises LocalUserError when there are more than --skip-bad."""
        self.skipped += count
        if self.skipped > self.options.skip_bad:
            allowed = self.options.skip_bad
            raise LocalUserError(f"{error} (unreadable images: {self.skipped}, --skip-bad allows {allowed})")
