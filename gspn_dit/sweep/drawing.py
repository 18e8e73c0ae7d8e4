"""Features of candidates' images: drawn chunk by chunk by all processes, kept on disk until the sweep is over."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gspn_dit.checkpoint import read_manifest
from gspn_dit.diffusion import CHUNK
from gspn_dit.errors import UserError
from gspn_dit.files import write_whole
from gspn_dit.pipeline import GSPNPipeline
from gspn_dit.sweep.halving import Candidate
from gspn_dit.training.post_hoc_ema import ema_file_stem, find_snapshots, write_reconstruction

if TYPE_CHECKING:
    from accelerate import PartialState

    from gspn_dit.locks import Lock

Unit = tuple[int, int]
"""A candidate's number and a chunk of its images."""


class Scorer(Protocol):
    """Features of images."""

    def features(self, pixels: np.ndarray, device: str) -> Tensor:
        """Return float32 [n, d] on the CPU of uint8 images [n, H, W, C]."""


class Weights:
    """The weights that candidates ask for; averages of other lengths are made in a folder.

    Args:
        checkpoint: the one that is swept.
        stem: "ema" or "model", of its own weights.
        folder: for averages.
        vae, device: as of `GSPNPipeline.from_checkpoint`.
    """

    def __init__(self, checkpoint: Path, stem: str, folder: Path, vae: str | None, device: str | torch.device) -> None:
        self.checkpoint, self.stem, self.folder = checkpoint, stem, folder
        self.vae, self.device = vae, device
        self._loaded: tuple[float | None, GSPNPipeline] | None = None

    def place(self, length: float | None) -> Path:
        """Return the checkpoint that has weights of this length."""
        return self.checkpoint if length is None else self.folder / ema_file_stem(length)

    def check(self, lengths: Iterable[float | None]) -> None:
        """Raise UserError where averages are asked for that the checkpoint's run has no snapshots of."""
        if any(length is not None for length in lengths):
            self._newest_snapshot()

    def make(self, lengths: Iterable[float | None]) -> None:
        """Write the averages that are not there yet; raises UserError where the snapshots do not allow it."""
        for length in lengths:
            place = self.place(length)
            if length is not None and not place.exists():
                write_reconstruction(self._run(), length, self._newest_snapshot(), place)

    def _run(self) -> Path:
        return self.checkpoint.resolve().parent.parent

    def _newest_snapshot(self) -> int:
        step = read_manifest(self.checkpoint)["step"]
        steps = [snapshot.step for snapshot in find_snapshots(self._run()) if snapshot.step <= step]
        if self.checkpoint.resolve().parent.name != "checkpoints" or not steps:
            raise UserError(
                f"--ema: {self.checkpoint} has no snapshots of averages in its run; train with "
                "training.ema_sigma_rel: [0.05, 0.1], or leave it out"
            )
        return max(steps)

    def pipeline(self, length: float | None) -> GSPNPipeline:
        """Load them; those that were asked for last stay loaded."""
        if self._loaded is None or self._loaded[0] != length:
            stem = self.stem if length is None else "ema"
            pipeline = GSPNPipeline.from_checkpoint(self.place(length), stem, self.device, self.vae)
            pipeline.set_progress_bar_config(disable=True)
            self._loaded = length, pipeline
        return self._loaded[1]


class FeatureFiles:
    """A file of features for each chunk of each candidate."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, unit: Unit) -> Path:
        return self.folder / f"{unit[0]:04d}" / f"{unit[1]:06d}.npy"

    def missing(self, numbers: Sequence[int], chunks: range) -> list[Unit]:
        """Return what is not there of some candidates, those of the same weights one after another."""
        units = [(number, chunk) for number in numbers for chunk in chunks]
        return [unit for unit in units if not self._file(unit).is_file()]

    def write(self, unit: Unit, features: Tensor) -> None:
        memory = io.BytesIO()
        np.save(memory, features.numpy(), allow_pickle=False)
        write_whole(self._file(unit), memory.getvalue())

    def read(self, number: int, chunks: range) -> Tensor:
        """Return the features of a candidate's images, float32 [n, d]; raises UserError for a damaged file."""
        parts = []
        for chunk in chunks:
            file = self._file((number, chunk))
            try:
                parts.append(torch.from_numpy(np.load(file, allow_pickle=False)))
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"{file} is damaged: {error}; delete it and give --resume to make it again") from None
        return torch.cat(parts)


class Drawing:
    """Draws units and keeps their features.

    Args:
        weights, files, scorer: what draws, keeps and sees.
        labels: class id of image i, int64.
        call: arguments of the pipeline that all candidates share.
        feature_dim: width of the features.
        state, lock: of this process and job.
    """

    def __init__(
        self,
        weights: Weights,
        files: FeatureFiles,
        scorer: Scorer,
        labels: np.ndarray,
        call: dict[str, Any],
        feature_dim: int,
        state: PartialState,
        lock: Lock,
    ) -> None:
        self.weights, self.files, self.scorer, self.labels, self.call = weights, files, scorer, labels, call
        self.feature_dim, self.state, self.lock = feature_dim, state, lock

    def draw(self, candidates: Sequence[Candidate], numbers: Sequence[int], chunks: range) -> None:
        """Draw what is missing of some candidates' chunks, this process its share; returns when all is there."""
        from accelerate.utils import broadcast_object_list

        lengths = [candidate.ema for candidate in candidates]
        if self.state.is_main_process:
            self.weights.make(dict.fromkeys(lengths[number] for number in numbers))
        ordered = sorted(numbers, key=lambda number: (lengths.index(lengths[number]), number))
        found = [self.files.missing(ordered, chunks)]
        broadcast_object_list(found)
        for unit in found[0][self.state.process_index :: self.state.num_processes]:
            features = self._features(candidates[unit[0]], unit[1])
            self.lock.check()
            self.files.write(unit, features)
        self.state.wait_for_everyone()

    def _features(self, candidate: Candidate, chunk: int) -> Tensor:
        """Return the features of a chunk, [CHUNK, d]; NaN where samples are not finite, as some settings make them."""
        start = chunk * CHUNK
        pipeline = self.weights.pipeline(candidate.ema)
        settings = {key: getattr(candidate, key) for key in ("guidance_scale", "guidance_interval", "sampling_shift")}
        labels = self.labels[start : start + CHUNK].tolist()
        try:
            pixels = pipeline(labels, first_index=start, output_type="np", **settings, **self.call).images
            return self.scorer.features(np.asarray(pixels), str(self.weights.device))
        except UserError:
            return torch.full((CHUNK, self.feature_dim), torch.nan)
