"""What a classifier gets right and wrong: answers to labelled images, figures of them, and pictures of the mistakes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from gspn_dit.data.classified import ClassifiedBatches
from gspn_dit.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCH = 256
SHOWN_CLASSES = 30
"""Of more classes, those that are most often mistaken are drawn."""
SHOWN_MISTAKES = 16
Z = 1.959964
"""Of a 95% interval."""


@dataclass(frozen=True)
class Answers:
    """What a classifier answers to labelled images."""

    probabilities: np.ndarray
    """Float32 [n, K]."""
    labels: np.ndarray
    """Int64 [n]."""
    class_names: Sequence[str]

    @cached_property
    def predicted(self) -> np.ndarray:
        """The most probable class of each image, int64 [n]."""
        return self.probabilities.argmax(axis=1)

    def top(self, count: int) -> float:
        """Return the share of images whose class is among so many most probable ones."""
        own = self.probabilities[np.arange(len(self.labels)), self.labels]
        return float(((self.probabilities > own[:, None]).sum(axis=1) < count).mean())

    @cached_property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        own = self.probabilities[np.arange(len(self.labels)), self.labels]
        return float(-np.log(np.maximum(own, 1e-30, dtype=np.float64)).mean())

    @cached_property
    def confusion(self) -> np.ndarray:
        """How many images of each class (rows) are taken for each class (columns), int64 [K, K]."""
        classes = len(self.class_names)
        return np.bincount(self.labels * classes + self.predicted, minlength=classes**2).reshape(classes, classes)

    def per_class(self) -> list[dict[str, float | int | str | None]]:
        """Return images, recall and precision of each class; None where there is nothing to divide by."""
        right, of, taken = np.diag(self.confusion), self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        return [
            {
                "class": name,
                "images": int(of[k]),
                "recall": float(right[k] / of[k]) if of[k] else None,
                "precision": float(right[k] / taken[k]) if taken[k] else None,
            }
            for k, name in enumerate(self.class_names)
        ]

    def worst(self, most: int) -> np.ndarray:
        """Return the rows of the mistakes that the classifier is surest of, the surest first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        sureness = self.probabilities[wrong, self.predicted[wrong]]
        return wrong[np.argsort(-sureness, kind="stable")[:most]]


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share of `count` independent trials (J. Am. Stat. Assoc. 22, 1927).

    >>> [round(bound, 4) for bound in wilson(0.9, 100)]
    [0.8256, 0.9448]
    """
    centre, spread = share + Z**2 / (2 * count), Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return (centre - spread) / (1 + Z**2 / count), (centre + spread) / (1 + Z**2 / count)


@torch.no_grad()
def classify(
    model: nn.Module, data: ClassifiedBatches, rows: Sequence[int], device: torch.device, batch: int = BATCH
) -> Answers:
    """Ask a model for the classes of images by row."""
    found: list[Tensor] = []
    labels: list[Tensor] = []
    for start in range(0, len(rows), batch):
        images, own = data.at(rows[start : start + batch])
        found.append(model(images.to(device)).float().softmax(dim=1).cpu())
        labels.append(own)
    return Answers(torch.cat(found).numpy(), torch.cat(labels).numpy(), data.images.class_names)


def mistakes_picture(answers: Answers, data: ClassifiedBatches, rows: Sequence[int]) -> bytes:
    """Return a PNG of the confusion table and of the worst mistakes; `rows` are those that were asked about."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    _draw_confusion(left, answers)
    worst = answers.worst(SHOWN_MISTAKES)
    right.axis("off")
    side = math.isqrt(SHOWN_MISTAKES)
    right.set_title(f"the mistakes it is surest of, of {int((answers.predicted != answers.labels).sum()):,}")
    if len(worst):
        shown = data.shown([rows[row] for row in worst])
        for place, (row, pixels) in enumerate(zip(worst, shown, strict=True)):
            box = [place % side / side, 1 - (place // side + 1) / side, 0.9 / side, 0.8 / side]
            axis = right.inset_axes(box)
            axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255)
            own, taken = answers.class_names[answers.labels[row]], answers.class_names[answers.predicted[row]]
            sureness = answers.probabilities[row, answers.predicted[row]]
            axis.set_title(f"{own[:18]}\nfor {taken[:18]} {100 * sureness:.0f}%", fontsize=7)
            axis.axis("off")
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=80)
    plt.close(figure)
    return memory.getvalue()


def _draw_confusion(axis: Axes, answers: Answers) -> None:
    confusion, names = answers.confusion, list(answers.class_names)
    wrong = confusion.sum(axis=1) + confusion.sum(axis=0) - 2 * np.diag(confusion)
    kept = np.sort(np.argsort(-wrong, kind="stable")[:SHOWN_CLASSES])
    shown = confusion[np.ix_(kept, kept)]
    share = shown / np.maximum(1, confusion.sum(axis=1)[kept, None])
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    more = f", the {len(kept)} most mistaken of {len(names):,}" if len(kept) < len(names) else ""
    axis.set(title=f"top-1 {100 * answers.top(1):.2f}%{more}", xlabel="taken for", ylabel="class")
    labels = [names[k][:18] for k in kept]
    axis.set_xticks(range(len(kept)), labels, rotation=90, fontsize=8)
    axis.set_yticks(range(len(kept)), labels, fontsize=8)
    for row, column in np.argwhere(shown > 0) if len(kept) <= 15 else ():
        dark = "white" if share[row, column] > 0.5 else "black"
        axis.text(column, row, f"{shown[row, column]}", ha="center", va="center", fontsize=8, color=dark)


def draw_mistakes(answers: Answers, data: ClassifiedBatches, rows: Sequence[int], path: Path) -> None:
    """Write `mistakes_picture` to a PNG."""
    write_whole(path, mistakes_picture(answers, data, rows))
