"""How images of a study are judged: class agreement by another kind of classifier than the feature extractors."""

from __future__ import annotations

import numpy as np

from gspn_dit.data.images import ImageSet, evenly_spaced

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
