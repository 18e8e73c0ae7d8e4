"""Two jobs, one output: training, generation and encoding refuse the second one, and nothing is lost or mixed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gspn_dit import generate, processes
from gspn_dit.errors import UserError
from gspn_dit.locks import lock_file, sole_job
from gspn_dit.prepare import encode
from tests.data.tiny_vae import SIZE, write_folder, write_vae
from tests.test_generate import make
from tests.tiny import write_run
from tests.training.conftest import run_training, tiny_config


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def encode_into(tmp_path: Path) -> Callable[..., None]:
    """Encode a folder of images into a directory, in this process."""
    write_vae(tmp_path / "vae")
    write_folder(tmp_path / "images", 5)

    def run(out: Path, *more: str) -> None:
        source = ["--source", f"imagefolder:{tmp_path / 'images'}", "--vae", str(tmp_path / "vae")]
        size = ["--image-size", str(SIZE), "--shard-images", "2", "--workers", "1"]
        encode.run(encode.parse_arguments([*source, *size, "--out", str(out), *more]))

    return run


# -- the second job --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["set", "set.npz"])
def test_a_second_generation_is_refused_before_and_after_its_checks(
    run_directory: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other job begins before this one's arguments are looked at, or between these and its own lock."""
    with sole_job(tmp_path / name, "--out"):
        with pytest.raises(UserError, match=rf"--out .*{name} is in use by another job \(process \d+ on "):
            make(run_directory, tmp_path / name, count=3)
        monkeypatch.setattr(generate, "refuse_if_held", lambda *arguments: None)
        with pytest.raises(UserError, match=r"is in use by another job \(process \d+ on "):
            make(run_directory, tmp_path / name, count=3)
    make(run_directory, tmp_path / name, count=3)
    assert not list(tmp_path.rglob("*lock"))


def test_a_second_encoding_is_refused(
    encode_into: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sole_job(tmp_path / "latents", "--out"):
        with pytest.raises(UserError, match=r"--out .*latents is in use by another job \(process \d+ on "):
            encode_into(tmp_path / "latents")
        monkeypatch.setattr(encode, "refuse_if_held", lambda *arguments: None)
        with pytest.raises(UserError, match=r"is in use by another job \(process \d+ on "):
            encode_into(tmp_path / "latents", "--resume")
    encode_into(tmp_path / "latents")
    assert not lock_file(tmp_path / "latents").exists()


@pytest.mark.parametrize(("resume", "overwrite"), [(None, False), ("auto", False), (None, True)])
def test_a_second_training_is_refused(tmp_path: Path, resume: str | None, overwrite: bool) -> None:
    with sole_job(tmp_path / "run", "output_dir"):
        with pytest.raises(UserError, match=r"output_dir .*run is in use by another job \(process \d+ on "):
            run_training(tiny_config(tmp_path / "run"), resume, overwrite)
        assert [entry.name for entry in (tmp_path / "run").iterdir()] == [lock_file(tmp_path / "run").name]


# -- between the checks ----------------------------------------------------------------------------------------------


def test_a_set_that_another_job_made_between_the_checks_is_seen(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = processes.join

    def other_job_comes_and_goes(device: str | None) -> Any:
        monkeypatch.undo()
        make(run_directory, tmp_path / "set", "--seed", 7, count=3)
        return join(device)

    monkeypatch.setattr(processes, "join", other_job_comes_and_goes)
    with pytest.raises(UserError, match="exists; give --resume to continue it, --overwrite to replace it"):
        make(run_directory, tmp_path / "set", count=3)
    assert json.loads((tmp_path / "set" / "generation.json").read_text(encoding="utf-8"))["seed"] == 7


def test_a_job_that_was_taken_over_writes_nothing_more(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gspn_dit.sample_sets.PngFolder.begin", lambda *arguments: lock_file(tmp_path).unlink())
    with pytest.raises(UserError, match="another job has taken over"):
        make(run_directory, tmp_path, count=3)
    assert list(tmp_path.iterdir()) == []


# -- what else lies there --------------------------------------------------------------------------------------------


def test_the_users_own_json_beside_an_npz_is_kept(run_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "imagenet.json").write_text('{"mine": "a class index"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"imagenet\.json, in which the set would be described, is there already"):
        make(run_directory, tmp_path / "imagenet.npz", count=3)
    assert (tmp_path / "imagenet.json").read_text(encoding="utf-8") == '{"mine": "a class index"}'
    make(run_directory, tmp_path / "imagenet.npz", "--overwrite", count=3)
    assert json.loads((tmp_path / "imagenet.json").read_text(encoding="utf-8"))["complete"]
    (tmp_path / "imagenet.npz").unlink()
    make(run_directory, tmp_path / "imagenet.npz", count=3)  # a set's own description is no one's loss


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    run, precious = tmp_path / "run", ("report/thesis.tex", "samples/mine.png", "checkpoints/other.pt", "notes.txt")
    run_training(tiny_config(run, max_steps=2, sample_every=1))
    (run / "report").mkdir()
    for name in (*precious, "report/report.json", "checkpoints/step-00000009.partial"):
        (run / name).touch()
    run_training(tiny_config(run, max_steps=1), overwrite=True)
    left = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    assert left >= {*precious} and "report/report.json" not in left
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == ["other.pt", "step-00000001"]
    assert sorted(entry.name for entry in (run / "samples").iterdir()) == ["mine.png", "step-00000001.png"]


@pytest.mark.parametrize("config", [None, "a: 1", "{", "seed: .nan", "- 1"])
def test_overwrite_is_refused_where_no_run_is(tmp_path: Path, config: str | None) -> None:
    for name in ("samples/step-00000001.png", "report/index.html", "checkpoints/step-1/model.pt", "index.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    if config is not None:
        (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"holds checkpoints/step-1, but no run of this project, .* give another"):
        run_training(tiny_config(tmp_path, max_steps=1), overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
