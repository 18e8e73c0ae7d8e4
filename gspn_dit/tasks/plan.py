"""What a task tells of a run before it starts: enough to estimate its memory, FLOPs and files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from gspn_dit.config import Config
from gspn_dit.data.facts import MUCH_BYTES, DataFacts
from gspn_dit.data.sources import find_source
from gspn_dit.diffusion import Objective


@dataclass(frozen=True)
class Plan:
    """What a run would train and on what; made without a GPU, without the data, and in no memory."""

    model: nn.Module
    """On the meta device; with `gradient_checkpointing` set it keeps the inputs of its blocks alone."""
    inputs: Callable[[int], tuple[Tensor, ...]]
    """Return what the model is called with for so many samples; called where tensors take no memory."""
    multiply_adds: int
    """Of the model's forward pass for one sample."""
    images: int
    """Samples of an epoch."""
    data: str
    """A line on the data."""
    rows: list[tuple[str, str]] = field(default_factory=list)
    """What a person is told of the model and what it learns: rows of a word and a line."""
    blocks: int = 1
    """How many parts of about the same size are recomputed one by one under activation checkpointing."""
    frozen_elements: int = 0
    """Weights that are kept beside the model and not trained, such as what a teacher has of its own."""
    working_elements: int = 0
    """Elements for each sample that a backward pass recomputes and holds at its height, with their gradients."""


def shift_rows(objective: Objective) -> list[tuple[str, str]]:
    """Return what a person is told of shifted times: a row, or none where they are as they were drawn."""
    training, sampling = objective.training_shift, objective.sampling_shift
    if training == sampling == 1:
        return []
    return [("times", f"shifted by {training:.4g} in training, {sampling:.4g} in sampling")]


def cache_rows(config: Config, facts: DataFacts) -> list[tuple[str, str]]:
    """Return what a person is told of latents kept on disk, or not: a row, or none for pixels and for small files."""
    if facts.cache_bytes is None:
        return []
    size, much = gigabytes(facts.cache_bytes), facts.cache_bytes > MUCH_BYTES
    if find_source(config.data.name).latents is None:
        advice = "which is a lot: encode while training" if much else "and no step would pay for the encoder"
        return [("latents", f"encoded while training; gspn_dit.prepare.encode would write {size}, {advice}")]
    if not much:
        return []
    advice = "data.name imagefolder, latent.name and latent.vae encode while training instead, at the encoder's price"
    return [("latents", f"{size} on disk, read once an epoch; {advice}")]


def epochs_of(samples: int, images: int) -> str:
    """Return how often so many samples see each image, for people.

    >>> epochs_of(3, 180), epochs_of(1_280_000, 54)
    ('0.0167', '23,704')
    """
    epochs = samples / images
    return f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"


def gigabytes(count: int) -> str:
    """Return a number of bytes as text, such as "1.50 GB" or "0.02 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
