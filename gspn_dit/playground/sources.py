"""What the playground draws with: checkpoints and their averages of the weights, loaded when first asked for."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn_dit.checkpoint import is_builtin, read_manifest, resolve_checkpoint
from gspn_dit.errors import UserError
from gspn_dit.sampling_options import check_guidance

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from gspn_dit.pipeline import GSPNPipeline
    from gspn_dit.text_sampler import TextSampler

MOST_IMAGES = 64
"""Drawn at once: one chunk of the samplers, so that they all form together."""
MOST_STEPS = 1_000
Show = Callable[[int, Callable[[], "np.ndarray"]], None]
"""`show(steps, decode)`: after so many steps `decode()` returns the images as they are then, uint8 [n, H, W, C]."""


@dataclass(frozen=True)
class Settings:
    """What is drawn: `per_subject` images of each class or prompt, image i from the noise of (seed, i)."""

    subjects: tuple[str, ...]
    per_subject: int
    seed: int
    guidance_scale: float
    steps: int
    height: int | None = None
    width: int | None = None

    @property
    def rows(self) -> list[int]:
        """The place of each image's subject, in the order of the images."""
        return [row for row in range(len(self.subjects)) for _ in range(self.per_subject)]

    def check(self) -> None:
        """Raise UserError for what cannot be drawn by any model."""
        if not self.subjects:
            raise UserError("there is nothing to draw; choose a class, or write a prompt")
        for name, value, most in (("images of each", self.per_subject, MOST_IMAGES), ("steps", self.steps, MOST_STEPS)):
            if not 1 <= value <= most:
                raise UserError(f"{name}: {value}, but must be 1 to {most:,}")
        if len(self.rows) > MOST_IMAGES:
            raise UserError(
                f"{len(self.rows)} images are more than the {MOST_IMAGES} that are drawn at once; "
                f"choose fewer than {len(self.subjects)} classes or prompts, or fewer images of each"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: {self.seed}, but must lie in [0, 2^63)")
        try:
            check_guidance(self.guidance_scale, (0.0, 1.0), None)
        except ValueError as error:
            raise UserError(str(error)) from None


class Source(ABC):
    """One set of weights of a checkpoint."""

    subject: str
    """What there is to choose: "class" or "prompt"."""

    def __init__(self, checkpoint: str, weights: str, device: str) -> None:
        self.checkpoint, self.weights, self.device = checkpoint, weights, device
        self.directory = resolve_checkpoint(checkpoint)
        self.manifest = read_manifest(self.directory)

    @property
    def title(self) -> str:
        """The run's name and the weights', for people."""
        name = self.checkpoint if is_builtin(self.checkpoint) else Path(self.checkpoint).resolve().name
        return f"{name}, {weights_title(self.weights)}"

    @property
    def long_title(self) -> str:
        """The same with all of the path."""
        return f"{self.checkpoint}, {weights_title(self.weights)}"

    @property
    def class_names(self) -> list[str]:
        """The classes to choose from; none where any prompt will do."""
        return list(self.manifest.get("class_names") or [])

    @property
    @abstractmethod
    def any_size(self) -> bool:
        """Whether images of other sizes than in training can be asked for."""

    @abstractmethod
    def draw(self, settings: Settings, show: Show) -> np.ndarray:
        """Return the images, uint8 [n, H, W, C]; `show` is called after each step.

        Raises UserError or ValueError where the model cannot draw them.
        """

    def describe(self, settings: Settings) -> dict[str, Any]:
        """Return what is noted of the source beside a grid, with the command that draws the same images."""
        facts = {"checkpoint": str(self.directory), "weights": self.weights, "step": self.manifest.get("step")}
        if settings.height is not None or settings.width is not None or self.weights not in ("ema", "model"):
            return facts  # for which sample.py has no option
        return facts | {"command": shlex.join(self._command(settings))}

    def _command(self, settings: Settings) -> list[str]:
        return [
            *("python", "sample.py", "--checkpoint", self.checkpoint, "--weights", self.weights),
            *self._subject_words(settings.subjects),
            *("--per-class", str(settings.per_subject), "--seed", str(settings.seed)),
            *("--guidance-scale", f"{settings.guidance_scale:g}", "--steps", str(settings.steps), "--out", "grid.png"),
        ]

    @abstractmethod
    def _subject_words(self, subjects: Sequence[str]) -> list[str]:
        """Return the words of a command line that ask for classes or prompts."""


class ClassSource(Source):
    """Weights of a class-conditional model."""

    subject = "class"

    @cached_property
    def pipeline(self) -> GSPNPipeline:
        """The loaded model."""
        from gspn_dit.pipeline import GSPNPipeline

        pipeline = GSPNPipeline.from_checkpoint(self.directory, self.weights, self.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def any_size(self) -> bool:
        return not getattr(self.pipeline.model, "has_positions", False)

    def draw(self, settings: Settings, show: Show) -> np.ndarray:
        import numpy as np

        def on_step_end(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
            show(step + 1, lambda: pipeline.latent.decode(tensors["latents"]))

        learnt = self.pipeline.objective.second_time  # guidance is part of what the model has learnt
        images = self.pipeline(
            [settings.subjects[row] for row in settings.rows],
            num_inference_steps=settings.steps,
            guidance_scale=1.0 if learnt else settings.guidance_scale,
            seed=settings.seed,
            height=settings.height,
            width=settings.width,
            output_type="np",
            callback_on_step_end=on_step_end,
        ).images
        assert isinstance(images, np.ndarray)
        return images

    def _subject_words(self, subjects: Sequence[str]) -> list[str]:
        return ["--classes", ",".join(str(number) for number in self.pipeline.class_ids(subjects))]


class TextSource(Source):
    """Weights of a model that draws by prompt."""

    subject = "prompt"

    @cached_property
    def sampler(self) -> TextSampler:
        """The loaded model and its text encoder."""
        from gspn_dit.text_sampler import TextSampler

        return TextSampler.from_checkpoint(self.directory, self.weights, self.device)

    @property
    def any_size(self) -> bool:
        return True

    def draw(self, settings: Settings, show: Show) -> np.ndarray:
        from gspn_dit.diffusion import Guidance

        sampler = self.sampler

        def on_step_end(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
            show(step + 1, lambda: sampler.latent.decode(latents[: len(settings.rows)]))
            return latents

        return sampler.draw(
            [settings.subjects[row] for row in settings.rows],
            settings.steps,
            Guidance(settings.guidance_scale),
            seed=settings.seed,
            height=settings.height,
            width=settings.width,
            on_step_end=on_step_end,
        )

    def _subject_words(self, subjects: Sequence[str]) -> list[str]:
        return [word for prompt in subjects for word in ("--prompt", prompt)]


def weights_title(weights: str) -> str:
    """Return what people call a file of weights.

    >>> weights_title("ema"), weights_title("ema-0.050"), weights_title("model")
    ('EMA', 'EMA 0.05', 'no average')
    """
    if weights == "model":
        return "no average"
    length = weights.removeprefix("ema").removeprefix("-")
    return f"EMA {float(length):g}" if length else "EMA"


def open_sources(checkpoints: Sequence[str], device: str) -> list[Source]:
    """Return a source for each set of weights of each checkpoint, averages first.

    Raises UserError for what is no checkpoint of a model that draws, and where they cannot be compared: some draw by
    class and others by prompt, or their classes differ.
    """
    sources: list[Source] = []
    for checkpoint in dict.fromkeys(checkpoints):
        manifest = read_manifest(resolve_checkpoint(checkpoint))
        if "latent" not in manifest:
            raise UserError(f"{checkpoint} does not draw images; give a run of class-conditional or text-to-image")
        kind = TextSource if manifest.get("text") else ClassSource
        stems = [name.removesuffix(".safetensors") for name in manifest["files"]]
        chosen = [stem for stem in sorted(stems) if stem.split("-")[0] == "ema"]
        sources += [kind(checkpoint, stem, device) for stem in (*chosen, *(["model"] if "model" in stems else []))]
    first = sources[0]
    for source in sources:
        if source.subject != first.subject:
            raise UserError(
                f"{first.checkpoint} draws by {first.subject}, {source.checkpoint} by {source.subject}; "
                "start a playground for each"
            )
        if source.class_names != first.class_names:
            raise UserError(
                f"{first.checkpoint} and {source.checkpoint} have different classes; start a playground for each"
            )
    return sources
