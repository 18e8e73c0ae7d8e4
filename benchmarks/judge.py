"""A judge of class agreement: another kind of classifier than the feature nets, trained on the training split."""

from __future__ import annotations

import numpy as np

from gspn_dit.data.images import ImageSet

MOST_TRAINING_IMAGES = 8_000
"""A support vector machine's time grows with the square of them; evenly spaced images are taken."""


def judge_agreement(
    images: np.ndarray, labels: np.ndarray, training: ImageSet, validation: ImageSet
) -> dict[str, float]:
    """Return the judge's agreement with the requested labels, and its accuracy on the validation split.

    images are uint8 [n, H, W, C] of the size of the data set's.
    """
    from sklearn.svm import SVC

    def flat(pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(len(pixels), -1) / 255

    some = np.linspace(0, len(training) - 1, min(len(training), MOST_TRAINING_IMAGES)).astype(np.int64)
    judge = SVC(C=10, random_state=1).fit(flat(training.pixels(some)), training.labels[some])
    return {
        "class_agreement": float(judge.score(flat(images), labels)),
        "judge_validation_accuracy": float(judge.score(flat(validation.pixels()), validation.labels)),
    }
