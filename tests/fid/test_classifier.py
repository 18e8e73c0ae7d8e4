"""The feature extractor: its accuracy, its features, its file, and how it is made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fid.classifier import METADATA_KEY, Classifier, ClassifierInfo, load_classifier, save_classifier
from fid.extraction import extract
from fid.features import BUNDLED, FeatureNet, load_feature_net
from fid.labelled import Reference, interleave
from fid.metrics import class_agreement, frechet_distance, inception_scores
from fid.train_features import main, train_classifier
from gspn_dit.data import ImageSet, load_images
from gspn_dit.data.image_sources import stratified_split
from gspn_dit.errors import UserError

INFO = ClassifierInfo("plain", "dots", 4, 1, ("a", "b"), seed=0, width=8)


def test_the_bundled_weights_know_the_held_out_digits(net: FeatureNet, digits: Reference) -> None:
    held_out = digits.held_out
    assert held_out is not None and held_out.labels is not None
    accuracy = class_agreement(extract(net, held_out.pixels).logits, held_out.labels)
    assert accuracy >= 0.98
    assert accuracy == pytest.approx(net.description["validation_accuracy"], abs=1.5 / 360)
    assert BUNDLED["digits"].stat().st_size < 1_000_000


def test_the_bundled_features_are_standardised_and_tell_the_same_from_other(net: FeatureNet, digits: Reference) -> None:
    assert digits.held_out is not None and digits.images.labels is not None
    train = extract(net, digits.images.pixels).features.double()
    held_out = extract(net, digits.held_out.pixels).features
    assert train.shape == (1437, 64)
    assert train.mean(dim=0).abs().max() < 1e-4
    assert (train.std(dim=0) - 1).abs().max() < 1e-4
    half, other = stratified_split(digits.images.labels, 0.5)
    assert frechet_distance(train[half], train[other]) < 0.5
    assert frechet_distance(held_out, train) < 0.4
    noise = np.random.default_rng(0).integers(0, 256, (360, 8, 8, 1), dtype=np.uint8)
    assert frechet_distance(extract(net, noise).features, train) > 10
    assert frechet_distance(extract(net, 255 - digits.held_out.pixels).features, train) > 10


def test_real_digits_have_a_high_inception_score(net: FeatureNet, digits: Reference) -> None:
    held_out = digits.held_out
    assert held_out is not None
    logits = extract(net, held_out.pixels).logits[interleave(held_out.labels, 360)]
    assert 9.3 < inception_scores(logits).mean() < 10


def test_features_do_not_depend_on_the_batch_size(net: FeatureNet, digits: Reference) -> None:
    pixels = digits.images.pixels[:50]
    whole, parts = extract(net, pixels), extract(net, pixels, batch_size=7)
    torch.testing.assert_close(whole.features, parts.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.logits, parts.logits, rtol=1e-4, atol=1e-4)


def test_a_net_may_be_loaded_twice_and_says_what_it_is(net: FeatureNet) -> None:
    again = load_feature_net("digits")
    assert (again.score_suffix, again.image_size, again.channels, again.feature_dim) == ("digits", 8, 1, 64)
    assert again.sha256 == net.sha256 and len(again.sha256) == 64
    assert again.class_names == tuple("0123456789")


@pytest.mark.parametrize("architecture", ["conv", "plain"])
@pytest.mark.parametrize(("image_size", "channels"), [(4, 1), (9, 3), (28, 1)])
def test_a_file_gives_the_same_net_back(tmp_path: Path, architecture: str, image_size: int, channels: int) -> None:
    info = dataclasses.replace(INFO, architecture=architecture, image_size=image_size, channels=channels)
    model = Classifier(info).eval()
    model.feature_mean.fill_(0.5)
    save_classifier(model, info, tmp_path / "net.safetensors")
    loaded = load_classifier(tmp_path / "net.safetensors")
    images = torch.rand(3, channels, image_size, image_size)
    for found, expected in zip(loaded(images), model(images)):
        assert torch.equal(found, expected)
    assert loaded.info == info
    assert model(images)[0].shape == (3, 64) and model(images)[1].shape == (3, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.safetensors"]


def test_the_file_names_its_version_and_origin() -> None:
    with safe_open(str(BUNDLED["digits"]), framework="pt") as file:
        document = json.loads(file.metadata()[METADATA_KEY])
    assert document["format_version"] == 1 and document["data_set"] == "digits" and document["seed"] == 0
    assert document["validation_accuracy"] >= 0.98 and document["training_images"] == 1437


def write_net(path: Path, **changes: object) -> Path:
    """A file whose metadata says something else than the net in it."""
    document = {**dataclasses.asdict(INFO), **changes}
    save_file(Classifier(INFO).state_dict(), path, metadata={METADATA_KEY: json.dumps(document)})
    return path


def test_files_that_are_no_feature_net_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    with pytest.raises(
        UserError,
        match=r"no feature extractor 'digit': it is neither a file, nor a run of task .*, nor a .*did you mean",
    ):
        load_feature_net("digit")
    for content in (b"", b"\x80\x04N.", b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match="cannot be read as safetensors; a feature extractor is a safetensors file that"
        ):
            load_feature_net(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="has no 'feature_net' metadata; a feature extractor is"):
        load_feature_net(path)
    save_file({"weight": torch.zeros(2)}, path, metadata={METADATA_KEY: "[1"})
    with pytest.raises(UserError, match=r"metadata of .* is not that of a feature extractor"):
        load_feature_net(path)
    for changes, message in (
        ({"format_version": 2}, "has format_version 2; this version reads 1"),
        ({"architecture": "con"}, "unknown architecture 'con'; allowed are conv, plain; did you mean 'conv'"),
        ({"image_size": 10**9}, "out of range: image_size"),
        ({"data_set": "a/b"}, "out of range"),
        ({"class_names": []}, "out of range"),
        ({"feature_dim": "many"}, "is not that of a feature extractor"),
        ({"unknown": 1}, "is not that of a feature extractor"),
        ({"image_size": 16}, "the tensors in .* do not fit its metadata"),
    ):
        with pytest.raises(UserError, match=message):
            load_feature_net(write_net(path, **changes))
    broken = Classifier(INFO)
    broken.feature_std[0] = float("nan")
    save_classifier(broken, INFO, path)
    with pytest.raises(UserError, match=r"weights in .* are not finite"):
        load_feature_net(path)


@pytest.fixture(scope="module")
def some_digits() -> tuple[ImageSet, ImageSet]:
    train, validation = load_images("digits"), load_images("digits", split="validation")
    return dataclasses.replace(train, dataset=train.dataset.select(range(256))), validation


def test_training_learns_is_deterministic_and_standardises(some_digits: tuple[ImageSet, ImageSet]) -> None:
    train, validation = some_digits
    state = torch.random.get_rng_state()
    model = train_classifier(train, validation, "plain", seed=3, epochs=8)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.info.validation_accuracy is not None and model.info.validation_accuracy > 0.5
    features = model(torch.from_numpy(train.pixels()).permute(0, 3, 1, 2) / 255.0)[0]
    torch.testing.assert_close(features.std(dim=0), torch.ones(64), rtol=1e-3, atol=1e-3)
    short = [train_classifier(train, validation, "plain", seed=seed, epochs=1).state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(short[0][name], short[1][name]) for name in short[0])
    assert not torch.equal(short[0]["head.1.weight"], short[2]["head.1.weight"])


def test_the_training_command_checks_before_it_trains(tmp_path: Path) -> None:
    existing = tmp_path / "net.safetensors"
    existing.write_bytes(b"keep")
    for arguments, message in (
        (["--out", str(existing)], "exists; give --overwrite to replace it"),
        (["--out", str(tmp_path / "new"), "--data", "imagefolder"], "--data imagefolder needs --data-path"),
        (["--out", str(tmp_path / "new"), "--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--out", str(tmp_path / "new"), "--data", "digitz"], "no image set named 'digitz'|needs --data-path"),
        (["--out", str(tmp_path / "new"), "--arch", "conv"], "unknown argument --arch; did you mean '--architecture'"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)
    assert existing.read_bytes() == b"keep" and [entry.name for entry in tmp_path.iterdir()] == ["net.safetensors"]
