"""How images of a study are judged: class agreement by another kind of classifier than the feature extractors, and
emoji by the features of a classifier that the project trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gspn_dit.data.images import ImageSet, evenly_spaced
from gspn_dit.errors import ArgumentParser, UserError

MOST_IMAGES = 2_000
"""Of a split; a support vector machine's time grows with the square of them, and evenly spaced ones are taken."""


def judge_agreement(
    images: np.ndarray, labels: np.ndarray, training: ImageSet, validation: ImageSet
) -> dict[str, float]:
    """Return the judge's agreement with the requested labels, and its accuracy on the validation split.

    images are uint8 [n, H, W, C] of the size of the data set's.
    """
    from sklearn.svm import SVC

    def flat(pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(len(pixels), -1) / 255

    def some(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
        rows = evenly_spaced(len(images), MOST_IMAGES)
        return flat(images.pixels(rows)), images.labels[rows]

    judge = SVC(C=10, random_state=1).fit(*some(training))
    return {
        "class_agreement": float(judge.score(flat(images), labels)),
        "judge_validation_accuracy": float(judge.score(*some(validation))),
    }


@dataclass(frozen=True)
class Emoji:
    """Emoji in colour, a class for each design and group, and what judges them.

    Attributes:
        root: what `python -m gspn_dit.prepare.emoji_classes` wrote.
        features: a run of task classification on such images.
    """

    root: Path
    features: Path

    def scores(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return "fd" and "recall" of uint8 [n, H, W, C] against evenly spaced images of the training split."""
        from fid.evaluation import score
        from fid.features import load_feature_net
        from fid.images import LabelledImages, Reference
        from gspn_dit.data.images import load_images

        real = load_images("imagefolder", self.root, image_size=images.shape[1], split="train")
        rows = evenly_spaced(len(real), MOST_IMAGES)
        reference = Reference(LabelledImages(real.pixels(rows), "train", real.labels[rows]))
        net = load_feature_net(self.features)
        found = score(LabelledImages(images, "samples", labels), reference, net)["scores"]
        return {"fd": found[f"FD-{net.score_suffix}"], "recall": found["recall"]}


def add_emoji_options(parser: ArgumentParser) -> None:
    """Add what chooses emoji in place of the digits."""
    parser.add_argument("--data", choices=("digits", "emoji"), default="digits")
    parser.add_argument("--root", type=Path, help="of the emoji: what prepare.emoji_classes wrote")
    parser.add_argument("--features", type=Path, help="of the emoji: a run of task classification")


def emoji_of(data: str, root: Path | None, features: Path | None) -> Emoji | None:
    """Return the emoji that the options chose; None for the digits."""
    if data == "digits":
        return None
    if root is None or features is None:
        raise UserError("--data emoji needs --root (the images) and --features (a run of task classification)")
    return Emoji(root.absolute(), features.absolute())
