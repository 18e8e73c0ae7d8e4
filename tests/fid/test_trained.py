"""A run of task classification as a feature extractor: by hand, in a report, while training, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

import fid
from fid.extraction import extract
from fid.features import load_feature_net
from fid.images import LabelledImages, Reference
from fid.quick import load_scorer
from gspn_dit.classifier import ImageClassifier
from gspn_dit.data.augment import normalise
from gspn_dit.errors import UserError
from tests.tasks.test_classification import config
from tests.training.conftest import changed, fresh_accelerator, run_training, tiny_config  # noqa: F401 (a fixture for all tests)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps on the centres, 6×6, of the digits."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    place = tmp_path_factory.mktemp("classifier") / "run"
    settings = config(place, {"evaluation_crop": 0.75}, max_steps=4)
    run_training(changed(settings, data={"image_size": 6}))
    return place


def test_features_and_logits_are_those_of_the_averaged_model(run: Path, digits: Reference) -> None:
    net, classifier = load_feature_net(run), ImageClassifier.from_checkpoint(run)
    pixels = digits.images.pixels[:20]
    found = extract(net, pixels)
    inputs = torch.from_numpy(np.ascontiguousarray(pixels[:, 1:7, 1:7, 0]))[:, None]
    with torch.no_grad():
        grids = classifier.model.forward_features(normalise(inputs, classifier.config.classification))  # type: ignore[operator]
    torch.testing.assert_close(found.features, grids.mean((2, 3)))
    torch.testing.assert_close(found.logits, classifier.model.head(grids.mean((2, 3))))  # type: ignore[operator]
    assert found.features.shape == (20, net.feature_dim) == (20, 16)


def test_it_is_called_after_its_data_and_known_by_its_weights(run: Path) -> None:
    net = load_feature_net(str(run))
    weights = run / "checkpoints" / "step-00000004" / "ema.safetensors"
    assert net.names["fd"] == "FD-digits" and (net.image_size, net.channels) == (8, 1)
    assert net.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert net.class_names == tuple("0123456789")
    assert (net.description["step"], net.description["architecture"]) == (4, "gspn_nano")


def test_a_report_is_scored_with_it(run: Path, digits: Reference) -> None:
    images, net = digits.images, load_feature_net(run)
    assert images.labels is not None
    real, negative = (
        fid.score(LabelledImages(pixels, "some digits", images.labels[:300]), digits, net)
        for pixels in (images.pixels[:300], 255 - images.pixels[:300])
    )
    assert real["settings"]["feature_net"]["source"] == str(run) and real["comparable"] is False
    assert 0 <= 10 * real["scores"]["FD-digits"] < negative["scores"]["FD-digits"]


def test_training_watches_a_distance_with_it(run: Path) -> None:
    scorer = load_scorer(str(run), "digits", 8, 1)
    assert (scorer.name, scorer.feature_dim) == ("FD-digits", 16)
    with pytest.raises(UserError, match="reads images of 8 pixels with 1 channels, these have 16 with 1"):
        load_scorer(str(run), "digits", 16, 1)


def test_what_is_no_classifier_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        load_feature_net(tmp_path)
    run_training(tiny_config(tmp_path / "other", max_steps=1))
    with pytest.raises(UserError, match="is not of task classification: class-conditional"):
        load_feature_net(tmp_path / "other")
