"""Named protocols: what they refuse, what they call their scores, and when published figures stand beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fid
from fid import evaluation
from fid.checks import check_samples
from fid.cli import main
from fid.extraction import extract_all
from fid.images import LabelledImages, Reference, read_reference, read_samples
from fid.moments import Gaussian
from fid.page import markdown, published_table, setting_rows
from fid.report import PUBLISHED_ROWS, published_rows
from gspn_dit.errors import UserError
from gspn_dit.protocols import ADM_50K, PROTOCOLS, Protocol, find_protocol
from tests.fid.conftest import TINY_DIM, noise_images, tiny_net

SMALL_ADM = dataclasses.replace(ADM_50K, num_samples=60, image_size=8, num_classes=5, kid_subset_size=20)
STATED = {"weights": "ema", "labels": "uniform", "uint8": "truncate", "guidance_scale": 1.0, "step": 400_000}


def drawn_images(count: int = 60, **generation: Any) -> LabelledImages:
    labels = np.random.default_rng(1).integers(0, 5, count)
    return LabelledImages(noise_images(count, 0), "samples", labels, None, {**STATED, **generation})


def adm_reference(folder: Path, name: str = "VIRTUAL_imagenet256_labeled.npz") -> tuple[Path, dict[str, np.ndarray]]:
    """A file like ADM's: images, and statistics of more images than it holds."""
    arrays: dict[str, np.ndarray] = {"arr_0": noise_images(40, 1, low=40)}
    for (mean, covariance), width in ((("mu", "sigma"), TINY_DIM), (("mu_s", "sigma_s"), 6)):
        rows = np.random.default_rng(width).normal(size=(100, width))
        arrays |= {mean: rows.mean(axis=0), covariance: np.cov(rows, rowvar=False)}
    np.savez(folder / name, **arrays)
    return folder / name, arrays


def score(samples: LabelledImages, reference: Reference, suffix: str = "", protocol: Protocol = SMALL_ADM) -> Any:
    return fid.score(samples, reference, tiny_net(suffix), protocol=protocol)


def test_adm_50k_is_what_its_name_says() -> None:
    knobs = find_protocol("adm-50k").knobs()
    assert knobs["num_samples"] == 50_000 and knobs["image_size"] == 256 and knobs["features"] == "inception"
    assert knobs["reference_file"] == "VIRTUAL_imagenet256_labeled.npz"
    assert knobs["required"] == {"weights": "ema", "labels": "uniform", "uint8": "truncate"}
    assert (knobs["order"], knobs["inception_splits"], knobs["neighbourhood"]) == ("stored", 10, 3)
    assert knobs["full_rank"] and knobs["comparable"]
    assert [name for name, protocol in PROTOCOLS.items() if protocol.comparable] == ["adm-50k", "adm-50k-512"]
    with pytest.raises(UserError, match=r"unknown protocol 'adm50k'; allowed are adm-50k, .*did you mean 'adm-50k'"):
        find_protocol("adm50k")


def test_adm_statistics_take_the_place_of_the_images_moments(tmp_path: Path) -> None:
    path, arrays = adm_reference(tmp_path)
    reference, drawn = read_reference(path, 8), drawn_images()
    report = score(drawn, reference)
    scores = report["scores"]
    assert list(scores) == ["FID", "sFID", "IS", "KID", "precision", "recall", "n"]
    (found,), _ = extract_all(drawn, [tiny_net()])
    for name, layer, mean, covariance in (("FID", "features", "mu", "sigma"), ("sFID", "spatial", "mu_s", "sigma_s")):
        target = Gaussian(torch.from_numpy(arrays[mean]), torch.from_numpy(arrays[covariance]))
        own = Gaussian.fit(found.moments[layer])
        assert scores[name] == pytest.approx(target.frechet_distance(own), abs=1e-9)
        assert report["intervals"][name]["low"] <= scores[name] <= report["intervals"][name]["high"]
    images_only = score(drawn, Reference(reference.images))["scores"]
    assert images_only["FID"] != pytest.approx(scores["FID"], rel=1e-3)
    for name in ("IS", "KID", "precision", "recall"):  # these are of the file's own images
        assert images_only[name] == scores[name]
    assert report["settings"]["reference"]["statistics"] is not None


def test_statistics_of_another_net_are_not_used(tmp_path: Path) -> None:
    reference = read_reference(adm_reference(tmp_path)[0], 8)
    report = score(drawn_images(), reference, "unknown")
    assert (
        report["scores"]["FD-unknown"]
        == score(drawn_images(), Reference(reference.images), "unknown")["scores"]["FD-unknown"]
    )
    assert not any("FID" in name for name in report["scores"])
    assert {"FD-unknown", "sFD-unknown", "IS-unknown", "KID-unknown"} <= set(report["scores"])
    assert report["settings"]["reference"]["statistics"] is None and not report["comparable"]
    assert any("are no FID" in note for note in report["notes"])
    assert any("statistics are of another net" in note for note in report["notes"])


def test_published_rows_stand_beside_comparable_scores_alone(tmp_path: Path) -> None:
    reference = read_reference(adm_reference(tmp_path)[0], 8)
    elsewhere = read_reference(adm_reference(tmp_path, "mine.npz")[0], 8)
    report = score(drawn_images(), reference)
    models = [row["model"] for row in report["published"]]
    assert report["comparable"] and models == [row.model for row in PUBLISHED_ROWS[:4]]
    table = published_table(report)
    assert table[1][0] == "these samples" and table[1][2:4] == ("400000", "1.0")
    assert table[1][4] == f"{report['scores']['FID']:.4g}"
    assert ("GSPN-XL/2, published", "690M", "400K", "1", "15.26", "6.51", "85.99", "0.67", "0.67") in table
    assert "GSPN-XL/2, published" in markdown(report)
    guided = score(drawn_images(guidance_scale=1.5), reference)
    assert [row["fid"] for row in guided["published"]] == [2.27]
    for other in (
        score(drawn_images(), elsewhere),
        score(drawn_images(), reference, "unknown"),
        score(drawn_images(), reference, protocol=PROTOCOLS["quick"]),
    ):
        assert not other["comparable"] and other["published"] == [] and published_table(other) == []
        assert "published |" not in markdown(other)
    assert published_rows(None) == published_rows(4.0) == list(PUBLISHED_ROWS)


def test_another_number_of_images_is_in_the_name(tmp_path: Path) -> None:
    reference = read_reference(adm_reference(tmp_path)[0], 8)
    report = score(drawn_images(37), reference, protocol=PROTOCOLS["quick"])
    assert list(report["scores"])[:4] == ["FID-37", "sFID-37", "IS-37", "KID-37"]
    assert report["intervals"] == {} and any("Not comparable" in note for note in report["notes"])


def test_real_images_of_another_number_have_no_fid_beside_the_samples(tmp_path: Path) -> None:
    reference = read_reference(adm_reference(tmp_path)[0], 8)
    for count, shown in ((60, True), (30, False)):
        held_out = LabelledImages(noise_images(count, 7, low=40), "held out")
        report = score(drawn_images(), dataclasses.replace(reference, held_out=held_out))
        assert (report["held_out"]["FID"] is not None) == shown
        assert report["held_out"]["IS"]["mean"] > 1 and report["comparison"]["n"] == count
        assert report["comparison"]["fd_held_out"] > 0
        assert any("are left out" in note for note in report["notes"]) != shown


def test_samples_stored_by_class_are_interleaved_for_the_splits(tmp_path: Path) -> None:
    reference = read_reference(adm_reference(tmp_path)[0], 8)
    drawn = drawn_images()
    assert score(drawn, reference)["settings"]["inception_score"]["order"].startswith("as stored")
    order = np.argsort(drawn.labels, kind="stable")
    by_class = dataclasses.replace(drawn, pixels=drawn.pixels[order], labels=drawn.labels[order])
    report = score(by_class, reference)
    assert report["settings"]["inception_score"]["order"].startswith("interleaved")
    assert any("stored class by class" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": noise_images(59, 0), "labels": None}, "needs 60 samples, samples has 59; --protocol quick"),
        ({"pixels": noise_images(60, 0, 16)}, "needs samples of 8x8 pixels with 3 channels, samples has 16x16 with 3"),
        ({"pixels": noise_images(60, 0)[..., :1]}, "with 3 channels, samples has 8x8 with 1"),
        ({"labels": np.full(60, 5)}, "has the class ids 0 to 4, samples has 5"),
        (
            {"generation": {"labels": "balanced"}},
            "needs samples with labels 'uniform'; those at samples were",
        ),
        ({"generation": {"weights": "model"}}, "with weights 'ema'; those at samples were generated with 'model'"),
    ],
)
def test_samples_that_the_name_would_misdescribe_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_samples(SMALL_ADM, dataclasses.replace(drawn_images(), **change))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    check_samples(SMALL_ADM, drawn_images())
    check_samples(SMALL_ADM, dataclasses.replace(drawn_images(), generation=None))


def test_samples_and_reference_must_fit(tmp_path: Path) -> None:
    reference = read_reference(adm_reference(tmp_path)[0], 8)
    with pytest.raises(UserError, match=r"the samples \(samples\) are 16x16, the reference \(.*npz\) is 8x8; both"):
        score(LabelledImages(noise_images(60, 0, 16), "samples"), reference, protocol=PROTOCOLS["quick"])
    with pytest.raises(UserError, match=r"FD-tiny needs at least 10 sample images \(one for each of .*\), 9 given"):
        score(LabelledImages(noise_images(9, 0), "few"), reference, "tiny", Protocol("p", "inception", full_rank=False))
    strict = Protocol("p", "inception", inception_splits=2)
    with pytest.raises(UserError, match=r"FD-tiny needs at least 9 sample images \(its 8 features \+ 1\), 8 given"):
        score(LabelledImages(noise_images(8, 0), "few"), reference, "tiny", strict)


def test_a_misspelt_class_is_refused_and_another_naming_is_noted(digits: Reference, net: fid.FeatureNet) -> None:
    names = (*"012345678", "nein")
    pixels, labels = digits.images.pixels[:100], digits.images.labels[:100]
    with pytest.raises(UserError, match=r"have the class 'nein', which is not among the reference's 10 classes"):
        fid.score(LabelledImages(pixels, "x", labels, names), digits, net)


def test_the_sidecar_is_read_printed_and_believed(tmp_path: Path, save: Callable[..., Path], digits: Reference) -> None:
    path = save(digits.images.pixels[:80], digits.images.labels[:80])
    stated = {"format_version": 1, "complete": True, "guidance_scale": 1.2, "sampler": {"name": "heun", "steps": 9}}
    path.with_suffix(".json").write_text(json.dumps(stated))
    fid.evaluate(path, "digits", out=tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| generation.guidance_scale | 1.2 |" in text and "| generation.sampler.steps | 9 |" in text
    assert "| protocol.neighbourhood | 3 |" in text and "| tf32 | False |" in text
    path.with_suffix(".json").write_text(json.dumps({"class_names": [f"digit {index}" for index in range(10)]}))
    assert read_samples(path).class_names[3] == "digit 3"
    (row,) = setting_rows({"class_names": ["name"] * 1000})
    assert len(row[1]) < 400 and row[1].endswith("… (see report.json)")
    for content, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ('{"complete": false}', r"are incomplete \(samples\.json says so\); run the generation again"),
        ('{"class_names": ["a"]}', r"has the class id 9; its generation names 1 classes"),
    ):
        path.with_suffix(".json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_samples(path)


def test_bad_statistics_are_refused(tmp_path: Path) -> None:
    _, good = adm_reference(tmp_path)
    slanted = good["sigma"].copy()
    slanted[0, 1] += 1
    for changes, message in (
        ({"mu": np.zeros(3)}, r"have the shapes \(3,\), \(8, 8\); needed are \[d\], \[d, d\]"),
        ({"mu": np.zeros(8, np.int64)}, "are int64, float64; floating-point numbers are needed"),
        ({"sigma": good["sigma"] * np.nan}, "hold NaN or infinite values"),
        ({"sigma": slanted}, "the covariance is not symmetric"),
        ({"sigma": np.full((8, 8), {}, dtype=object)}, "holds pickled objects, which are never loaded"),
        ({"sigma": slanted[0]}, "needed are"),
    ):
        np.savez(tmp_path / "bad.npz", **{**good, **changes})
        with pytest.raises(UserError, match=message):
            read_reference(tmp_path / "bad.npz", 8)


def test_statistics_of_other_features_are_refused(tmp_path: Path) -> None:
    _, arrays = adm_reference(tmp_path)
    np.savez(tmp_path / "wide.npz", **{**arrays, "mu": np.zeros(9), "sigma": np.eye(9)})
    with pytest.raises(UserError, match=r"wide\.npz are of 9 features values; the feature extractor gives 8"):
        score(drawn_images(), read_reference(tmp_path / "wide.npz", 8))
    pooled = {name: arrays[name] for name in ("arr_0", "mu", "sigma")}
    np.savez(tmp_path / "pooled.npz", **pooled)
    report = score(drawn_images(), read_reference(tmp_path / "pooled.npz", 8))
    assert "FID" in report["scores"] and "sFID" not in report["scores"]  # no spatial statistics to measure against
    np.savez(tmp_path / "spatial.npz", **{name: arrays[name] for name in ("arr_0", "mu_s", "sigma_s")})
    with pytest.raises(UserError, match="has mu_s and sigma_s, but neither mu nor sigma"):
        read_reference(tmp_path / "spatial.npz", 8)


def test_protocols_and_weights_go_together(tmp_path: Path, save: Callable[..., Path]) -> None:
    path = save(np.zeros((70, 8, 8, 1), np.uint8))
    with pytest.raises(UserError, match="are for the Inception net; protocol digits uses 'digits'"):
        evaluation.evaluate(path, "digits", protocol="digits", weights="w.pth")
    with pytest.raises(UserError, match="brings its own feature extractor; leave --features out"):
        main(
            [
                "--samples",
                str(path),
                "--reference",
                "digits",
                "--protocol",
                "digits",
                "--features",
                "digits",
                "--out",
                "x",
            ]
        )
