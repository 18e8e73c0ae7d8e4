"""The evaluation as a whole: scores, comparisons, the report's files, and refusals that leave nothing behind."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fid
from fid import evaluation, intervals, page, report
from fid.cli import main
from fid.features import FeatureNet
from fid.images import LabelledImages, Reference
from fid.scores import METRICS, Metric, Scoring
from gspn_dit.data import load_images
from gspn_dit.errors import UserError


@pytest.fixture(scope="module")
def of_held_out(net: FeatureNet, digits: Reference) -> dict[str, Any]:
    """The held-out digits scored as if they were samples."""
    assert digits.held_out is not None
    return fid.score(digits.held_out, digits, net)


@pytest.fixture
def samples(digits: Reference, save: Callable[..., Path]) -> Path:
    """The first 100 training digits as samples, sorted by class."""
    assert digits.images.labels is not None
    labels = digits.images.labels[:100]
    order = np.argsort(labels, kind="stable")
    return save(digits.images.pixels[:100][order], labels[order])


def test_held_out_images_score_as_themselves(of_held_out: dict[str, Any]) -> None:
    assert of_held_out["scores"] == of_held_out["held_out"]
    comparison = of_held_out["comparison"]
    assert (comparison["n"], comparison["fd_ratio_at_equal_n"], comparison["nearest_distance_ratio"]) == (360, 1, 1)
    scores = of_held_out["scores"]
    assert list(scores)[:5] == ["FD-digits", "IS-digits", "KID-digits", "precision", "recall"]
    assert scores["FD-digits"] == comparison["fd_samples"] < 0.4
    assert scores["precision"] > 0.8 and scores["recall"] > 0.8 and scores["class_agreement"] >= 0.98
    assert scores["nearest_distance"] > 0.5
    assert "FID" not in json.dumps(of_held_out["scores"])


def test_the_report_holds_every_setting(of_held_out: dict[str, Any], net: FeatureNet, digits: Reference) -> None:
    settings = of_held_out["settings"]
    assert settings["samples"]["n"] == 360 and settings["reference"]["n"] == 1437
    assert settings["samples"]["sha256"] == settings["held_out"]["sha256"]
    assert settings["reference"]["sha256"] == digits.images.sha256
    assert settings["feature_net"]["sha256"] == net.sha256 and settings["feature_net"]["image_size"] == 8
    assert settings["inception_score"]["splits"] == 10 and settings["precision_recall"]["neighbourhood"] == 3
    assert settings["kernel_distance"] == {"subsets": 50, "subset_size": 300, "seed": 0}
    assert {"torch", "torch-fidelity", "numpy", "gspn-dit", "python"} <= set(settings["versions"])


def test_a_metric_is_one_entry(
    net: FeatureNet, digits: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored beside the others, for the samples and the held-out images, with its interval and title."""

    def ink(scoring: Scoring) -> np.ndarray:
        return (scoring.images.images.pixels / 255).mean(axis=(1, 2, 3))

    toy = Metric(
        lambda scoring: float(ink(scoring).mean()),
        lambda scoring: intervals.mean(ink(scoring), scoring.images.strata),
        title="mean of the pixels",
    )
    monkeypatch.setitem(METRICS, "ink", toy)
    monkeypatch.setitem(METRICS, "absent", Metric(lambda _: 1 / 0, applies=lambda scoring: len(scoring.images) > 5000))
    drawn = LabelledImages(digits.images.pixels[:100], "some", digits.images.labels[:100])
    result = fid.score(drawn, digits, net)
    assert result["scores"]["ink"] == pytest.approx(drawn.pixels.mean() / 255) and "absent" not in result["scores"]
    assert digits.held_out is not None
    assert result["held_out"]["ink"] == pytest.approx(digits.held_out.pixels.mean() / 255)
    assert result["intervals"]["ink"]["low"] < result["scores"]["ink"] < result["intervals"]["ink"]["high"]
    report.write_report(result, drawn, tmp_path / "report")
    rows = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    shown = f"{result['scores']['ink']:#.3g} [{result['intervals']['ink']['low']:#.3g}, "
    assert f"| mean of the pixels | {shown}" in rows and f" | {result['held_out']['ink']:#.3g} |\n" in rows


def test_training_images_as_samples_are_found_out(net: FeatureNet, digits: Reference) -> None:
    result = fid.score(digits.images, digits, net)
    assert result["scores"]["FD-digits"] < 1e-6
    assert (result["scores"]["precision"], result["scores"]["recall"]) == (1, 1)
    assert result["scores"]["nearest_distance"] == 0 and result["comparison"]["nearest_distance_ratio"] == 0


def test_noise_scores_badly(net: FeatureNet, digits: Reference) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 1), dtype=np.uint8)
    result = fid.score(LabelledImages(noise, "noise", np.arange(400) % 10), digits, net)
    assert result["comparison"]["fd_ratio_at_equal_n"] > 20
    assert result["scores"]["precision"] < 0.3 and result["scores"]["class_agreement"] < 0.3
    assert result["comparison"]["nearest_distance_ratio"] > 1.5


def test_the_comparison_takes_the_first_interleaved_samples(net: FeatureNet, digits: Reference) -> None:
    images, held_out = digits.images, digits.held_out
    assert images.labels is not None and held_out is not None
    by_class = np.argsort(images.labels, kind="stable")
    ordered = LabelledImages(images.pixels[by_class], "ordered", images.labels[by_class])
    first = fid.score(ordered, digits, net)
    again = fid.score(images, digits, net)
    for key in ("fd_samples", "recall_samples"):
        assert first["comparison"][key] == pytest.approx(again["comparison"][key], rel=1e-3)
    assert first["comparison"]["fd_samples"] < 0.5  # and not that of the first 360 zeros, ones and twos
    assert first["scores"]["IS-digits"]["mean"] == pytest.approx(again["scores"]["IS-digits"]["mean"], rel=1e-3)
    few = LabelledImages(images.pixels[:100], "few", images.labels[:100])
    assert fid.score(few, digits, net)["comparison"]["n"] == 100


def test_classes_are_matched_by_name(net: FeatureNet, digits: Reference) -> None:
    assert digits.images.labels is not None
    images = LabelledImages(digits.images.pixels[:100], "some", digits.images.labels[:100])
    digits = Reference(digits.images)
    # the same images under ids that count the names backwards
    renamed = LabelledImages(images.pixels, "renamed", 9 - digits.images.labels[:100], tuple("9876543210"))
    assert fid.score(renamed, digits, net)["scores"]["class_agreement"] > 0.99
    strangers = LabelledImages(images.pixels, "strangers", images.labels, tuple("abcdefghij"))
    result = fid.score(strangers, digits, net)
    assert result["scores"]["class_agreement"] is None
    assert any("class names are not the feature extractor's" in note for note in result["notes"])


def test_unlabelled_samples_and_a_reference_without_a_split(net: FeatureNet, digits: Reference) -> None:
    result = fid.score(LabelledImages(digits.images.pixels[:80], "x"), Reference(digits.images), net)
    assert result["held_out"] is None and result["comparison"] is None
    assert result["scores"]["class_agreement"] is None
    assert any("no labels" in note for note in result["notes"])
    assert any("no validation split" in note for note in result["notes"])
    assert page.ratio_rows(result) == [] and len(page.score_rows(result)[0]) == 2


def test_too_few_held_out_images_are_a_note(net: FeatureNet, digits: Reference) -> None:
    assert digits.held_out is not None and digits.held_out.labels is not None
    few = LabelledImages(digits.held_out.pixels[:64], "few", digits.held_out.labels[:64])
    result = fid.score(digits.images, Reference(digits.images, few), net)
    assert result["held_out"] is None
    assert any("64 held-out images are too few to be scored; 65 are needed" in note for note in result["notes"])


def test_the_command_writes_the_report(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "report"
    main(["--samples", str(samples), "--reference", "digits", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "FD-digits" in printed and str(out) in printed
    assert sorted(entry.name for entry in out.iterdir()) == sorted(report.FILES)
    assert os.listdir(out.parent) == ["report"]
    stored = json.loads((out / "report.json").read_text())
    assert stored["scores"]["n"] == 100 and stored["comparison"]["n"] == 100
    text = (out / "report.md").read_text()
    value = f"{stored['scores']['FD-digits']:#.3g}"
    assert f"| FD-digits | {value} [" in text and "![samples by class](grid.png)" in text
    assert f"| feature_net.sha256 | {stored['settings']['feature_net']['sha256']} |" in text
    html = (out / "index.html").read_text()
    picture = base64.b64encode((out / "grid.png").read_bytes()).decode()
    assert f"data:image/png;base64,{picture}" in html and f"<td>{value}</td>" in html
    assert "http" not in html and 'src="grid' not in html
    with Image.open(out / "grid.png") as grid:
        assert grid.height >= 10 * 48


def test_a_report_is_replaced_only_on_request_and_only_by_a_whole_one(
    of_held_out: dict[str, Any], digits: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report"
    out.mkdir()  # an empty directory is as good as none
    report.write_report(of_held_out, digits.images, out)
    with pytest.raises(UserError, match="is not empty; give --overwrite to replace the report in it"):
        report.write_report(of_held_out, digits.images, out)
    with pytest.raises(UserError, match="is not empty; give --overwrite to replace the report in it"):
        fid.evaluate("unread.npz", out=out)
    other = {**of_held_out, "notes": ["another"]}
    report.write_report(other, digits.images, out, overwrite=True)
    assert json.loads((out / "report.json").read_text()) == other

    monkeypatch.setattr(report, "page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_report(of_held_out, digits.images, out, overwrite=True)
    assert json.loads((out / "report.json").read_text()) == other
    with pytest.raises(ZeroDivisionError):
        report.write_report(of_held_out, digits.images, tmp_path / "new")
    assert os.listdir(tmp_path) == ["report"]


def test_overwrite_spares_what_is_no_report(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_text("precious")
    with pytest.raises(UserError, match=r"holds something besides a report \(model\.safetensors\)"):
        fid.evaluate(samples, "digits", "digits", tmp_path / "run", overwrite=True)
    with pytest.raises(UserError, match="is a file; give a directory"):
        fid.evaluate(samples, "digits", "digits", samples)


def test_sets_that_do_not_fit_the_net_are_refused(net: FeatureNet, digits: Reference) -> None:
    pixels = digits.images.pixels
    good, few = LabelledImages(pixels[:70], "good"), LabelledImages(pixels[:64], "few")
    wide = LabelledImages(np.zeros((70, 8, 9, 1), np.uint8), "wide")
    coloured = LabelledImages(np.zeros((70, 8, 8, 3), np.uint8), "coloured")
    out_of_range = LabelledImages(pixels[:70], "range", np.full(70, 10))
    cases = [
        (few, good, "FD-digits needs at least 65 sample images (its 64 features + 1), 64 given (few)"),
        (good, few, "FD-digits needs at least 65 reference images (its 64 features + 1), 64 given (few)"),
        (wide, good, "the samples (wide) are 8x9 with 1 channel(s); the feature extractor 'digits' reads 8x8 with 1"),
        (
            coloured,
            good,
            "the samples (coloured) are 8x8 with 3 channel(s); the feature extractor 'digits' reads 8x8 with 1",
        ),
        (good, coloured, "the reference (coloured) are 8x8 with 3 channel(s)"),
        (out_of_range, good, "(range) have the class id 10; the feature extractor 'digits' knows the ids 0 to 9"),
    ]
    for drawn, reference, message in cases:
        with pytest.raises(UserError) as caught:
            fid.score(drawn, Reference(reference), net)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_refusals_leave_nothing_behind(save: Callable[..., Path], samples: Path, tmp_path: Path) -> None:
    nan = save(np.full((70, 8, 8, 1), np.nan, np.float32), name="nan.npz")
    for arguments, message in (
        ({"samples": tmp_path / "none.npz"}, "no samples at"),
        ({"samples": nan}, "has 4480 NaN or infinite values"),
        ({"reference": "digitz"}, "no reference 'digitz'"),
        ({"features": "digitz"}, "no feature extractor 'digitz'"),
        ({"batch_size": 0}, "batch size must be at least 1, not 0"),
        ({"device": "gpu"}, "the device 'gpu' cannot be used here"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            fid.evaluate(**{"samples": samples, "out": tmp_path / "out", **arguments})
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["nan.npz", "samples.npz"]


def test_a_net_of_other_data_names_the_scores(tmp_path: Path, save: Callable[..., Path]) -> None:
    from fid.classifier import save_classifier
    from fid.train_features import train_classifier

    generator = np.random.default_rng(0)
    for index in range(160):
        folder = tmp_path / "spots" / ("train" if index < 90 else "val") / ("dark" if index % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        values = generator.integers(0, 100, (6, 6, 3)) + (0 if index % 2 else 155)
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{index:03d}.png")
    data = [load_images("imagefolder", tmp_path / "spots", split) for split in ("train", "validation")]
    model = train_classifier(data[0], data[1], "conv", epochs=2)
    save_classifier(model, model.info, tmp_path / "spots.safetensors")
    drawn = save(data[1].pixels(), data[1].labels)
    result = fid.evaluate(drawn, tmp_path / "spots", tmp_path / "spots.safetensors", tmp_path / "report")
    assert result["names"]["fd"] == "FD-spots" and set(result["scores"]) >= {"FD-spots", "IS-spots", "KID-spots"}
    assert result["comparison"]["fd_ratio_at_equal_n"] == pytest.approx(1, abs=1e-6)
    assert (tmp_path / "report" / "report.md").read_text().startswith("# FD-spots report")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fid", *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "nowhere.npz", "--reference", "digits", "--out", "r"), "no samples at nowhere.npz"),
        (("--sample", "x", "--reference", "digits", "--out", "r"), "--samples"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = command(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not Path("r").exists()


def test_help_imports_nothing_heavy_and_evaluation_no_model() -> None:
    assert "--samples" in command("--help").stdout
    code = (
        "import sys, fid, fid.cli; fid.cli.build_parser(); "
        "assert not {'torch', 'datasets', 'torch_fidelity'} & set(sys.modules), 'heavy'; "
        "import fid.evaluation, fid.train_features; "
        "bad = [n for n in sys.modules if n.startswith(('gspn_dit.models', 'gspn_dit.diffusion', "
        "'gspn_dit.training', 'gspn_dit.pipeline'))]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_public_names_resolve() -> None:
    assert fid.evaluate is evaluation.evaluate and fid.score is evaluation.score
    assert dataclasses.is_dataclass(fid.FeatureNet)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fid.nothing
