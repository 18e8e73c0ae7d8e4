"""Reference curves: which runs they fit, what a page and the end of a training make of them, and what is shipped."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gspn_dit.checkpoint import checkpoint_directory, write_checkpoint
from gspn_dit.config import Config, load_config
from gspn_dit.errors import UserError
from gspn_dit.training import reference as module
from gspn_dit.training.charts import BEHIND
from gspn_dit.training.reference import (
    FOLDER,
    IGNORED,
    MOST_GRID_BYTES,
    Reference,
    find_reference,
    last_losses,
    main,
    read_reference,
    settings_of,
    small_picture,
    to_json,
)
from gspn_dit.training.run_directory import newest_grid
from gspn_dit.training.run_page import render
from tests.training.conftest import changed, run_training, tiny_config
from tests.training.test_run_page import path_of, write_metrics

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(FOLDER.glob("*.json"))
TITLE = "reference: tiny.yaml, seed 5, commit 0123456"


def reference_for(config: Config, **changes: Any) -> Reference:
    curves = {"loss": [(1, 3.0), (2, 1.0)], "val_loss": [(2, 1.0)], "quick_fd": [(2, 9.0)]}
    whole = Reference("tiny.yaml", (5,), "0123456789", settings_of(config.to_dict()), "data", curves, (1.0,), 0.5, 1.5)
    return dataclasses.replace(whole, **changes)


def ship(folder: Path, monkeypatch: pytest.MonkeyPatch, *references: Reference) -> None:
    """Let the package have these references and no others."""
    folder.mkdir(exist_ok=True)
    for number, reference in enumerate(references):
        (folder / f"{number}.json").write_text(to_json(reference), encoding="utf-8")
    monkeypatch.setattr(module, "FOLDER", folder)


# -- what is shipped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_reference_is_that_of_a_config_as_it_stands(path: Path) -> None:
    reference = read_reference(path)
    assert reference.config == f"{path.stem}.yaml" and re.fullmatch(r"[0-9a-f]{40}", reference.commit)
    config = load_config(CONFIGS / reference.config).to_dict()
    assert reference.fitted(config, reference.fingerprint) == reference, "record it anew"
    assert {*reference.settings} <= {*settings_of(config)}, "a setting is gone: record it anew"
    assert path.stat().st_size < 10_000
    for key, curve in reference.curves.items():
        assert all(math.isfinite(x) and math.isfinite(y) for x, y in curve), key
    steps = reference.settings["training.max_steps"]
    assert reference.curves["loss"][-1][0] == steps
    verdict = reference.judge(reference.curves["loss"])
    assert verdict is not None and "within" in verdict


@pytest.mark.parametrize("name", ["demo", "demo_colour"])
def test_the_demos_have_a_reference_and_its_last_samples(name: str) -> None:
    grid = read_reference(FOLDER / f"{name}.json").grid
    assert grid is not None and grid.stat().st_size <= MOST_GRID_BYTES
    with Image.open(grid) as picture:
        assert picture.format == "PNG" and min(picture.size) > 200


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format_version": 2}', '{"format_version": 1}'],
)
def test_what_is_no_reference_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError):
        read_reference(tmp_path / "x.json")


def test_a_damaged_reference_has_no_band_or_curve(tmp_path: Path) -> None:
    for change in ({"low": 1.5}, {"curves": {}}, {"high": math.nan}):
        (tmp_path / "x.json").write_text(to_json(reference_for(Config(), **change)))
        with pytest.raises(ValueError, match="has no curve or band of the loss"):
            read_reference(tmp_path / "x.json")


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    reference = reference_for(Config(), seeds=(5, 6))
    (tmp_path / "x.json").write_text(to_json(reference), encoding="utf-8")
    assert read_reference(tmp_path / "x.json") == reference


# -- which runs it fits ----------------------------------------------------------------------------------------------


def curves_for(own: Config, of: Config, fingerprint: str | None = "data") -> set[str]:
    fitted = reference_for(of).fitted(own.to_dict(), fingerprint)
    return set() if fitted is None else {*fitted.curves}


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"sharding": "fsdp", "compile": True, "mixed_precision": "bf16", "num_processes": 2}},
        {"training": {"gradient_accumulation_steps": 2, "log_every": 2, "fd_every": 1, "checkpoint_every": 1}},
        {"data": {"path": "/elsewhere"}},
        {"sampling": {"guidance_scale": 4.0, "per_class": 2}},
    ],
)
def test_how_and_where_a_run_is_computed_does_not_matter(tmp_path: Path, sections: dict[str, dict[str, Any]]) -> None:
    config = tiny_config(tmp_path)
    own = dataclasses.replace(changed(config, **sections), seed=77, output_dir="elsewhere")
    assert curves_for(own, config) == {"loss", "val_loss", "quick_fd"}


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"depth": 3}},
        {"model": {"mixer": "attention"}},
        {"data": {"validation_fraction": 0.2}},
        {"objective": {"timestep_sampling": "logit-normal"}},
        {"training": {"max_steps": 5}},
        {"training": {"batch_size": 16}},
        {"training": {"learning_rate": 1e-3}},
    ],
)
def test_another_model_data_objective_or_schedule_has_no_reference(
    tmp_path: Path, sections: dict[str, dict[str, Any]]
) -> None:
    config = tiny_config(tmp_path)
    assert curves_for(changed(config, **sections), config) == set()


def test_other_data_under_the_same_settings_has_no_reference(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert curves_for(config, config, "other data") == curves_for(config, config, None) == set()


def test_curves_that_are_measured_otherwise_are_left_out(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert curves_for(changed(config, sampling={"steps": 9}), config) == {"loss", "val_loss"}
    assert curves_for(changed(config, training={"fd_samples": 9}), config) == {"loss", "val_loss"}
    assert curves_for(changed(config, training={"validation_images": 9}), config) == {"loss", "quick_fd"}


def test_a_setting_that_the_reference_does_not_know_has_its_default(tmp_path: Path) -> None:
    config, key = tiny_config(tmp_path), "training.muon_momentum"
    older = {name: value for name, value in settings_of(config.to_dict()).items() if name != key}
    reference = reference_for(config, settings=older)
    assert reference.fitted(config.to_dict(), "data") is not None
    assert reference.fitted(changed(config, training={"muon_momentum": 0.5}).to_dict(), "data") is None


def test_every_ignored_setting_exists() -> None:
    assert {f"training.{field.name}" for field in dataclasses.fields(Config().training)} >= {
        key for key in IGNORED if key.startswith("training.")
    }
    assert all(hasattr(Config().sampling, key.partition(".")[2]) for key in IGNORED if key.startswith("sampling."))


# -- the loss of the last steps --------------------------------------------------------------------------------------


def test_lines_of_the_last_fifth_of_the_steps_count() -> None:
    """Of 100 steps the lines that lie in 80 … 100: that at 90 begins at 75, that at 100 at 90."""
    assert last_losses([(60, 5.0), (75, 4.0), (90, 3.0), (100, 2.0)], 100) == [2.0]
    assert last_losses([(80, 4.0), (90, 3.0), (100, 2.0)], 100) == [3.0, 2.0]
    assert last_losses([(100, 2.0)], 100) == []


@pytest.mark.parametrize("last, word", [(0.6, "within"), (1.4, "within"), (1.6, "OUTSIDE"), (0.4, "OUTSIDE")])
def test_the_verdict(tmp_path: Path, last: float, word: str) -> None:
    """Of 10 steps the last two count, here with the mean `last` in 0.5 … 1.5."""
    reference = reference_for(tiny_config(tmp_path, max_steps=10))
    verdict = reference.judge([(8, 7.0), (9, last - 0.2), (10, last + 0.2)])
    assert verdict == (
        f"loss    {last:.4g} over the last 2 steps, {word} the 0.5 to 1.5 of the reference: "
        "tiny.yaml, seed 5, commit 0123456"
    )
    assert reference.judge([(5, 1.0), (10, 1.0)]) is None  # a line of five steps says nothing about two


# -- the page --------------------------------------------------------------------------------------------------------


def write_run(run: Path, config: Config) -> Path:
    write_metrics(run, {"step": 1, "loss": 2.0}, {"step": 2, "val_loss": 1.0}, {"step": 2, "learning_rate": 0.1})
    manifest = {"config": config.to_dict(), "data": {"fingerprint": "data"}}
    write_checkpoint(checkpoint_directory(run, 2), 2, {"model": {"weight": torch.zeros(1)}}, manifest)
    return run


def without_time(page: str) -> str:
    return re.sub(r"\d\d:\d\d:\d\d", "", page)


def test_the_reference_is_drawn_in_grey_behind_the_runs_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 to 2 fill the width from 58 to 430, the values 1 to 3 the height from 224 up to 24."""
    config = tiny_config(tmp_path)
    ship(tmp_path / "references", monkeypatch, reference_for(config))
    page = render(write_run(tmp_path / "run", config))
    (training,) = re.findall(r"<h2>Training loss</h2>(.*?)</section>", page)
    assert path_of(training, f"{TITLE}: loss") == [(58.0, 24.0), (430.0, 224.0)]
    assert path_of(training, "loss") == [(58.0, 124.0)]
    assert training.index(f'stroke="{BEHIND}"') < training.index('data-name="loss"')
    assert f'<span style="color:{BEHIND}">●</span> {TITLE}</span></div>' in training
    (rate,) = re.findall(r"<h2>Learning rate</h2>(.*?)</section>", page)
    assert "reference" not in rate
    assert "<h2>Quick FD" not in page  # of which the run itself has none


@pytest.mark.parametrize("why", ["none", "other model", "other data", "damaged", "no checkpoint"])
def test_a_page_without_a_reference_is_the_page_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    config, folder = tiny_config(tmp_path), tmp_path / "references"
    run = write_run(tmp_path / "run", config)
    ship(tmp_path / "nothing", monkeypatch)
    before = without_time(render(run))
    reference = {
        "none": [],
        "other model": [reference_for(changed(config, model={"depth": 9}))],
        "other data": [reference_for(config, fingerprint="other")],
        "damaged": [],
        "no checkpoint": [reference_for(config)],
    }[why]
    ship(folder, monkeypatch, *reference)
    if why == "damaged":
        (folder / "x.json").write_text(to_json(reference_for(config))[:-9])
    if why == "no checkpoint":
        next((run / "checkpoints").rglob("config.json")).unlink()
    assert without_time(render(run)) == before
    assert "reference" not in before


def test_the_references_samples_are_beside_the_runs_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    ship(tmp_path / "references", monkeypatch, reference_for(config))
    run = write_run(tmp_path / "run", config)
    (run / "samples").mkdir()
    for step in (1, 2):
        Image.new("RGB", (2, 2), (step, 0, 0)).save(run / "samples" / f"step-{step:08d}.png")
    assert "samples of the reference" not in render(run)  # there is no picture
    Image.new("RGB", (2, 2), (0, 9, 0)).save(tmp_path / "references" / "0.png")
    pictures = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', render(run))
    assert [alt for alt, _ in pictures] == ["samples at step 2", f"samples of the {TITLE}", "samples at step 1"]
    colours = [Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) for _, data in pictures]
    assert colours == [(2, 0, 0), (0, 9, 0), (1, 0, 0)]


def test_a_picture_is_made_small_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise does not shrink by its palette; half the sides are a quarter of the bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.new("RGB", (300, 400)).save(tmp_path / "plain.png")
    sizes = []
    for name in ("noise", "plain"):
        content = small_picture(tmp_path / f"{name}.png")
        assert len(content) <= MOST_GRID_BYTES
        sizes.append(Image.open(io.BytesIO(content)).size)
    assert sizes[0] in ((300, 225), (200, 150)) and sizes[1] == (300, 400)
    monkeypatch.setattr(module, "MOST_GRID_BYTES", 60)
    with pytest.raises(UserError, match=r"noise.png is too large for a reference; lower sampling.per_class"):
        small_picture(tmp_path / "noise.png")


def test_the_first_that_fits_is_taken_whatever_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    ship(tmp_path / "references", monkeypatch, reference_for(Config()), reference_for(config, seeds=(8,)))
    found = find_reference(config.to_dict(), "data")
    assert found is not None and found.seeds == (8,)


# -- recording, and the end of a training ----------------------------------------------------------------------------


def config_file(folder: Path, config: Config) -> Path:
    """The config as JSON, which is YAML."""
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(config.to_dict()))
    return path


def commit(run: Path, **changes: Any) -> None:
    facts = {"git_commit": "0123456789", "git_changes": False, **changes}
    (run / "environment.json").write_text(json.dumps(facts))


def record(monkeypatch: pytest.MonkeyPatch, file: Path, out: Path, *runs: Path) -> None:
    monkeypatch.setattr("sys.argv", ["reference", "--config", str(file), "--out", str(out), *map(str, runs)])
    main()


def test_a_training_is_judged_by_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run makes the reference; another seed's is compared with it, and its page has the first one's curve."""
    runs = [tmp_path / "run5", tmp_path / "run6"]
    first, second = (
        dataclasses.replace(tiny_config(run, max_steps=15, checkpoint_every=15), seed=seed)
        for run, seed in zip(runs, (5, 6))
    )
    monkeypatch.setattr(module, "FOLDER", tmp_path / "references")
    run_training(first)
    commit(runs[0])
    assert "reference" not in capsys.readouterr().out
    out = tmp_path / "references" / "tiny.json"
    record(monkeypatch, config_file(tmp_path, first), out, runs[0])
    reference = read_reference(out)
    assert (reference.seeds, reference.config) == ((5,), "tiny.yaml")
    assert reference.grid == out.with_suffix(".png") and newest_grid(runs[0]) is not None
    losses = [json.loads(line)["loss"] for line in (runs[0] / "metrics.jsonl").read_text().splitlines()[:15]]
    assert [y for _, y in reference.curves["loss"]] == pytest.approx(losses, rel=1e-4)
    assert {*reference.curves} == {"loss", "grad_norm", "val_loss", *(f"val_loss_q{n}" for n in range(1, 5))}

    capsys.readouterr()
    out.write_text(to_json(dataclasses.replace(reference, low=0.0, high=100.0)))
    run_training(second)
    assert "over the last 3 steps, within the 0 to 100 of the reference: tiny.yaml, seed 5" in capsys.readouterr().out
    assert f'data-name="{TITLE}: loss"' in (runs[1] / "index.html").read_text(encoding="utf-8")


def test_the_band_is_three_deviations_of_the_logged_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 steps the lines 9 and 10 of both runs: 1, 2, 3 and 4, of mean 2.5 and deviation √(5/3)."""
    config, runs = tiny_config(tmp_path, max_steps=10), [tmp_path / "a", tmp_path / "b"]
    for run, (ninth, tenth) in zip(runs, ((1.0, 2.0), (3.0, 4.0))):
        manifest = {"config": config.to_dict(), "data": {"fingerprint": "data"}}
        write_checkpoint(checkpoint_directory(run, 10), 10, {"model": {"weight": torch.zeros(1)}}, manifest)
        write_metrics(run, *({"step": n, "loss": y} for n, y in ((8, 9.0), (9, ninth), (10, tenth))))
        commit(run)
    record(monkeypatch, config_file(tmp_path, config), tmp_path / "x.json", *runs)
    reference = read_reference(tmp_path / "x.json")
    width = 3 * math.sqrt(5 / 3)
    assert reference.means == (1.5, 3.5)
    assert (reference.low, reference.high) == pytest.approx((2.5 - width, 2.5 + width), rel=1e-4)


@pytest.mark.parametrize(
    "what, words",
    [
        ("unfinished", "is at step 2 of 10; let it end by --resume auto"),
        ("no run", "is at step 0 of 10; let it end by --resume auto"),
        ("other", "has model.depth = 2, but the config has 3; train it anew"),
        ("changes", "was not trained in one go by a committed state of the source; train it anew"),
        ("resumed", "was not trained in one go by a committed state of the source; train it anew"),
        ("silent", "logged too little to tell how much its loss varies; lower training.log_every"),
    ],
)
def test_what_cannot_be_a_reference_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, words: str
) -> None:
    config, run = tiny_config(tmp_path, max_steps=10), tmp_path / "run"
    if what != "no run":
        step = 2 if what == "unfinished" else 10
        manifest = {"config": config.to_dict(), "data": {"fingerprint": "data"}}
        write_checkpoint(checkpoint_directory(run, step), step, {"model": {"weight": torch.zeros(1)}}, manifest)
        lines = [(2, 1.0), (10, 1.0)] if what == "silent" else [(n, float(n)) for n in range(1, 41)]
        write_metrics(run, *({"step": n, "loss": y} for n, y in lines))
        commit(run, **{"changes": {"git_changes": True}, "resumed": {"resumed": [{}]}}.get(what, {}))
    file = config_file(tmp_path, changed(config, model={"depth": 3}) if what == "other" else config)
    with pytest.raises(UserError, match=re.escape(words)):
        record(monkeypatch, file, tmp_path / "x.json", run)
    assert not (tmp_path / "x.json").exists()
