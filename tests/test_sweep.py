"""Sweeps: what is tried and kept, scores that anyone can recompute, the same bits after a kill, the choice taken."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fid.checks import notes_on_choice
from fid.features import load_feature_net
from fid.images import LabelledImages, read_reference
from fid.metrics import frechet_distance
from fid.quick import load_scorer
from gspn_dit import generate
from gspn_dit.chosen import read_sweep
from gspn_dit.config import TrainArguments, config_from_dict
from gspn_dit.errors import UserError
from gspn_dit.files import sha256_of
from gspn_dit.pipeline import GSPNPipeline
from gspn_dit.sample_sets import read_settings
from gspn_dit.sweep.__main__ import parse_arguments
from gspn_dit.sweep.drawing import FeatureFiles
from gspn_dit.sweep.halving import Candidate, Rung, grid, plan, survivors
from gspn_dit.sweep.page import curves
from gspn_dit.sweep.run import run
from gspn_dit.training.loop import train
from gspn_dit.training.post_hoc_ema import write_reconstruction

ROOT = Path(__file__).resolve().parents[1]
COUNT = 256
SETTINGS = ("--guidance-scales", 1, 1.5, 3, "--guidance-intervals", "0,1", "0.2,0.7")
"""Five: without guidance there are no intervals."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on the digits, with snapshots of averages."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    training = {
        **{"max_steps": 4, "batch_size": 8, "validation_images": 8, "trackers": [], "learning_rate": 1e-2},
        **{"ema_sigma_rel": [0.05, 0.1], "ema_snapshot_every": 1, "ema_decay": 0.5, "ema_snapshot_dtype": "float32"},
    }
    config = {
        **{"output_dir": str(directory), "model": {"name": "DiT-N/4", "hidden_size": 16, "depth": 1}},
        **{"training": training, "sampling": {"steps": 2, "guidance_scale": 1.5, "per_class": 1}},
    }
    train(TrainArguments(config_from_dict(config), resume=None, overwrite=False))
    return directory


def words(trained: Path, out: Path, *more: Any) -> list[str]:
    start = ("--checkpoint", trained, "--reference", "digits", "--out", out, "--device", "cpu", "--factor", 2)
    return [str(word) for word in (*start, "--num-samples", COUNT, *(more or SETTINGS))]


def sweep(trained: Path, out: Path, *more: Any) -> dict[str, Any]:
    run(parse_arguments(words(trained, out, *more)))
    return read_sweep(out)


@pytest.fixture(scope="module")
def swept(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "sweep"
    sweep(trained, out)
    return out


def images(pipeline: GSPNPipeline, candidate: Candidate, rows: range) -> np.ndarray:
    drawn = pipeline(
        [row % 10 for row in rows],
        num_inference_steps=2,
        guidance_scale=candidate.guidance_scale,
        guidance_interval=candidate.guidance_interval,
        sampling_shift=candidate.sampling_shift,
        seed=0,
        first_index=rows.start,
        output_type="np",
    ).images
    assert isinstance(drawn, np.ndarray)
    return drawn


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


# -- what is tried ---------------------------------------------------------------------------------------------------


def test_grid_has_every_combination_once() -> None:
    found = grid([1.0, 2.0], [(0.0, 1.0), (0.0, 0.5)], [None, 0.1], [None])
    assert len(found) == len(set(found)) == 2 * 3
    assert [one.guidance_interval for one in found if one.guidance_scale == 1] == [(0.0, 1.0)] * 2
    assert Candidate.of(json.loads(json.dumps(found[-1].to_dict()))) == found[-1]


@pytest.mark.parametrize(
    ("arguments", "rounds"),
    [
        ((48, 2048, 65, 4, 64), [(48, 128), (12, 512), (3, 2048)]),
        ((48, 2048, 129, 4, 64), [(48, 512), (12, 2048)]),  # the first would be too few for the score
        ((5, 4096, 65, 4, 64), [(5, 1024), (2, 4096)]),
        ((3, 1000, 65, 2, 64), [(3, 512), (2, 1024)]),
        ((4, 1000, 65, 4, 64), [(4, 1024)]),  # one alone would be left
        ((10, 100, 65, 4, 64), [(10, 128)]),
    ],
)
def test_rounds(arguments: Any, rounds: list[tuple[int, int]]) -> None:
    assert plan(*arguments) == [Rung(*rung) for rung in rounds]


def test_a_quarter_of_the_grid_is_enough() -> None:
    """48 settings: 48·128 + 12·384 + 3·1536 images, 2·2048 fresh ones and at most 1,920 of the default, 22% of all."""
    images = 48 * 128 + 12 * 384 + 3 * 1536 + 2 * 2048 + 2048 - 128
    assert images / (48 * 2048) < 0.25


def test_equal_scores_keep_their_order() -> None:
    assert survivors({3: 1.0, 1: 1.0, 2: math.nan, 0: 0.5}, 4) == [0, 1, 3, 2]


# -- what comes out --------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_images(trained: Path, swept: Path) -> None:
    found, net = read_sweep(swept), load_scorer("digits", "digits", 8, 1)
    reference = net.features(read_reference("digits", 8).images.pixels[:], "cpu")
    pipeline = GSPNPipeline.from_checkpoint(trained)
    tried = [Candidate.of(one) for one in found["tried"]]
    assert tried == grid([1, 1.5, 3], [(0.0, 1.0), (0.2, 0.7)], [None], [None])
    assert found["rounds"] == [{"candidates": 5, "images": 128}, {"candidates": 3, "images": 256}]

    def score(number: int, rows: range) -> float:
        return frechet_distance(net.features(images(pipeline, tried[number], rows), "cpu"), reference)

    first = [score(number, range(128)) for number in range(5)]
    assert [one["scores"][0] for one in found["results"]] == pytest.approx(first, rel=1e-6)
    kept = {number for number in range(5) if len(found["results"][number]["scores"]) == 2}
    assert kept == {*sorted(range(5), key=first.__getitem__)[:3], found["default_number"]}
    last = {number: score(number, range(256)) for number in kept}
    chosen = min(last, key=last.__getitem__)
    assert (found["chosen"]["number"], found["chosen"]["score"]) == (chosen, pytest.approx(last[chosen], rel=1e-6))
    for title in ("chosen", "default"):
        fresh = score(found[title]["number"], range(256, 512))
        assert found[title]["fresh_score"] == pytest.approx(fresh, rel=1e-6)
    interval = found["results"][chosen]["interval"]
    assert interval["low"] < last[chosen] < interval["high"]


def test_budget_counts_every_image(swept: Path) -> None:
    found = read_sweep(swept)
    later = sum(len(one["scores"]) == 2 for one in found["results"])
    fresh = len({found["chosen"]["number"], found["default_number"]})
    drawn = 5 * 128 + later * 128 + fresh * 256
    assert found["budget"] == {"images": drawn, "images_of_full_grid": 1280, "share": drawn / 1280}


def test_the_page_shows_rounds_choice_and_table(swept: Path) -> None:
    found, text = read_sweep(swept), (swept / "index.html").read_text()
    assert text.count("<svg") == 2 and text.count("<tr") == 3 + 6
    assert f"{found['budget']['share']:.0%} of the full grid" in text
    assert f"{found['chosen']['fresh_score']:.4g}" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_curves_begin_without_guidance() -> None:
    tried = [one.to_dict() for one in grid([1, 2], [(0.0, 1.0), (0.0, 0.5)], [None], [None])]
    rows = [{**one, "scores": [float(number)]} for number, one in enumerate(tried)]
    assert curves(rows, 0) == {"t in [0, 1]": [(1, 0.0), (2, 1.0)], "t in [0, 0.5]": [(1, 0.0), (2, 2.0)]}
    assert curves(rows, 1) == {}


# -- again -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_sweep_resumes_with_the_same_bits(
    trained: Path, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write, written = tmp_path / "sweep", FeatureFiles.write, []

    def stop_after_seven(self: FeatureFiles, unit: Any, features: torch.Tensor) -> None:
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(unit)
        write(self, unit, features)

    monkeypatch.setattr(FeatureFiles, "write", stop_after_seven)
    with pytest.raises(KeyboardInterrupt):
        sweep(trained, out)
    with pytest.raises(UserError, match="is not finished; finish it with"):
        read_sweep(out)
    before, resumed = set(written), []

    def note(self: FeatureFiles, unit: Any, features: torch.Tensor) -> None:
        resumed.append(unit)
        write(self, unit, features)

    monkeypatch.setattr(FeatureFiles, "write", note)
    sweep(trained, out, *SETTINGS, "--resume")
    assert resumed and not before & set(resumed)  # nothing twice
    assert contents(out) == contents(swept)


def test_a_finished_sweep_is_not_made_again(trained: Path, swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(swept)
    sweep(trained, swept, *SETTINGS, "--resume")
    assert "is complete" in capsys.readouterr().out
    assert contents(swept) == before


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_are_one(trained: Path, swept: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, "-m", "gspn_dit.sweep", *words(trained, out)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    mine, one = (json.loads(contents(place)["sweep.json"]) for place in (out, swept))
    del mine["environment"], one["environment"]
    assert mine == one


# -- averages, shifts, and settings that fail ------------------------------------------------------------------------


def test_averages_and_shifts(trained: Path, tmp_path: Path) -> None:
    more = ("--guidance-scales", 1.5, "--ema", "own", 0.08, "--sampling-shifts", "own", 2, "--num-samples", 128)
    found = sweep(trained, tmp_path / "sweep", *more)
    assert [(one["ema"], one["sampling_shift"]) for one in found["tried"]] == [
        (None, None), (None, 2.0), (0.08, None), (0.08, 2.0),
    ]  # fmt: skip
    reference = load_scorer("digits", "digits", 8, 1)
    real = reference.features(read_reference("digits", 8).images.pixels[:], "cpu")
    last = Candidate.of(found["tried"][3])
    averaged, _ = write_reconstruction(trained, 0.08, 4, tmp_path / "averaged")
    drawn = images(GSPNPipeline.from_checkpoint(averaged), last, range(128))
    expected = frechet_distance(reference.features(drawn, "cpu"), real)
    assert found["results"][3]["scores"] == [pytest.approx(expected, rel=1e-6)]
    kept = [path.name for path in (tmp_path / "sweep" / "averages").glob("*")]
    assert kept == ([] if found["chosen"]["number"] < 2 else ["ema-0.080"])


def test_a_setting_whose_samples_are_not_finite_is_the_worst(trained: Path, tmp_path: Path) -> None:
    found = sweep(trained, tmp_path / "sweep", "--guidance-scales", 1, 1.5, 1e38, "--num-samples", 128)
    assert [one["scores"][0] is None for one in found["results"]] == [False, False, True]
    assert found["chosen"]["number"] != 2
    assert "–" in (tmp_path / "sweep" / "index.html").read_text()


# -- the choice taken ------------------------------------------------------------------------------------------------


def options(trained: Path, swept: Path, out: Path, *more: Any) -> list[str]:
    start = ("--checkpoint", trained, "--sweep", swept, "--out", out, "--num-samples", 70, "--device", "cpu", *more)
    return [str(word) for word in start]


def test_a_set_is_sampled_as_chosen_and_says_so(trained: Path, swept: Path, tmp_path: Path) -> None:
    generate.run(generate.parse_arguments(options(trained, swept, tmp_path / "set", "--seed", 3)))
    found, settings = read_sweep(swept), read_settings(tmp_path / "set")
    assert settings is not None
    for key in ("guidance_scale", "guidance_interval", "sampling_shift", "sampler", "num_inference_steps"):
        assert settings[key] == found["chosen"][key]
    assert settings["sweep"]["settings_tried"] == 5 and settings["sweep"]["score_name"] == "FD-digits"
    digits = read_reference("digits", 8).images.pixels[:70]
    (note,) = notes_on_choice(LabelledImages(digits, "set", generation=settings))
    assert note.startswith("Guidance and its interval were chosen: of 5 settings the one with the lowest FD-digits of ")
    assert "FD-digits of 256 images against digits, training split" in note
    assert "The seed is the sweep's" not in note
    (note,) = notes_on_choice(LabelledImages(digits, "set", generation={**settings, "seed": 0}))
    assert note.endswith("The seed is the sweep's, too, so that the first of these images are those it chose by.")
    assert notes_on_choice(LabelledImages(digits, "set", generation={"seed": 0})) == []


@pytest.mark.parametrize(
    ("varied", "said"),
    [
        (["guidance_scale"], "Guidance was chosen: of 9"),
        (["sampling_shift"], "The sampling shift was chosen: of 9"),
        (["guidance_scale", "ema"], "Guidance and the average of the weights were chosen: of 9"),
        (["guidance_scale", "guidance_interval", "sampling_shift"], "Guidance, its interval and the sampling shift"),
        (None, "Guidance, its interval, the average of the weights and the sampling shift were chosen: of 9"),
    ],
)  # fmt: skip
def test_only_what_had_several_values_is_said_to_be_chosen(varied: list[str] | None, said: str) -> None:
    """Sets from before it was recorded may have had several values of anything."""
    digits = read_reference("digits", 8).images.pixels[:70]
    sweep = {"settings_tried": 9, **({} if varied is None else {"varied": varied})}
    (note,) = notes_on_choice(LabelledImages(digits, "set", generation={"sweep": sweep}))
    assert note.startswith(said)


def test_what_contradicts_the_choice_is_refused(trained: Path, swept: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--guidance-scale 9\.0 contradicts the sweep .*, which chose"):
        generate.parse_arguments(options(trained, swept, tmp_path / "set", "--guidance-scale", 9))
    with pytest.raises(UserError, match=r"no sweep at .*nowhere: there is no"):
        generate.parse_arguments(options(trained, tmp_path / "nowhere", tmp_path / "set"))
    other, _ = write_reconstruction(trained, 0.08, 4, tmp_path / "averaged")
    with pytest.raises(UserError, match=r"has other weights than the sweep .* chose; leave it out"):
        generate.run(generate.parse_arguments(options(other, swept, tmp_path / "set")))
    with pytest.raises(UserError, match="required: --checkpoint, or --sweep"):
        generate.parse_arguments(["--out", str(tmp_path / "set"), "--num-samples", "1"])


def test_without_a_checkpoint_the_chosen_weights_are_drawn_with(trained: Path, swept: Path, tmp_path: Path) -> None:
    """An average that the sweep made, say, of which nobody has to know the place."""
    averaged, _ = write_reconstruction(trained, 0.08, 4, tmp_path / "averaged")
    sweep = shutil.copytree(swept, tmp_path / "sweep")
    found = json.loads((sweep / "sweep.json").read_text())
    found["chosen"] |= {"checkpoint": str(averaged), "weights_sha256": sha256_of(averaged / "ema.safetensors")}
    (sweep / "sweep.json").write_text(json.dumps(found))
    words = [word for word in options(trained, sweep, tmp_path / "set") if word not in ("--checkpoint", str(trained))]
    generate.run(generate.parse_arguments(words))
    settings = read_settings(tmp_path / "set")
    assert settings is not None and settings["checkpoint"] == str(averaged)


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--guidance-scales", -1), r"guidance scale is -1\.0, but must be at least 0 and finite"),
        (("--guidance-scales", "nan"), r"guidance scale is .*, but must be at least 0 and finite"),
        (("--guidance-intervals", "0.8,0.2"), r"guidance interval is \[0\.8, 0\.2\], but must be within"),
        (("--guidance-intervals", "0.8"), r"0\.8 is no interval; give it as LOW,HIGH"),
        (("--guidance-intervals", "a,b"), "argument --guidance-intervals: a,b is no interval; give it as LOW,HIGH"),
        (("--ema", "foo"), "argument --ema: foo is no number; give own, or a number such as 0.1"),
        (("--sampling-shifts", "own", "foo"), "argument --sampling-shifts: foo is no number; give own, or a number"),
        (("--ema", 0.5), r"--ema is 0\.5, but must be own or lie in \(0, 0\.28\]"),
        (("--sampling-shifts", 0), r"--sampling-shifts is 0\.0, but must be finite and above 0"),
        (("--factor", 1), "--factor is 1, but must be at least 2"),
        (("--steps", 0), "--steps is 0, but must be at least 1"),
        (("--seed", -1), "--seed is -1, but must lie in"),
        (("--resume", "--overwrite"), "contradict each other"),
        (("--sampler", "ddpm"), "unknown sampler 'ddpm'; allowed are euler"),
        (("--num-samples", 60), "--num-samples is 64 images, but FD-digits needs at least 65"),
        (("--guidance-scales", 1.5), "there is nothing to choose from: guidance 1.5 alone"),
        (("--features", "nothing"), "no feature extractor 'nothing'"),
        (("--reference", "nothing"), "nothing"),
        (("--classes", "0-99"), "99"),
    ],
)  # fmt: skip
def test_mistakes_take_one_line_and_leave_nothing(
    trained: Path, tmp_path: Path, more: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        sweep(trained, tmp_path / "sweep", *more)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_averages_need_snapshots(trained: Path, tmp_path: Path) -> None:
    other = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(other / "ema_snapshots")
    with pytest.raises(UserError, match=r"has no snapshots of averages in its run; train with training\.ema_sigma_rel"):
        sweep(other, tmp_path / "sweep", "--ema", "own", 0.1)


def test_another_sweep_is_not_continued(trained: Path, swept: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a sweep; give --resume to continue it, --overwrite to replace it"):
        sweep(trained, swept)
    with pytest.raises(UserError, match="was begun with num_inference_steps = 2, this run has 3"):
        sweep(trained, swept, *SETTINGS, "--steps", 3, "--resume")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="is not empty and holds no sweep; give another"):
        sweep(trained, tmp_path / "mine", *SETTINGS, "--overwrite")


def test_the_bundled_net_is_found_by_the_data() -> None:
    assert load_scorer(None, "digits", 8, 1).net.sha256 == load_feature_net("digits").sha256
    with pytest.raises(UserError, match="none is bundled for the data set 'mine'; give --features"):
        load_scorer(None, "mine", 8, 1, "--features")
