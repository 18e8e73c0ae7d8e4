"""One page of several runs: their curves under one another's axes, what differs, and mistakes in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from gspn_dit.errors import UserError
from gspn_dit.training.compare import differing_settings, main, render, run_names
from tests.training.test_run_page import path_of, write_metrics


def write_run(folder: Path, losses: list[float], config: str, steps: tuple[int, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    write_metrics(folder, *({"step": 10 * n, "loss": loss, "val_loss_q1": loss} for n, loss in enumerate(losses)))
    (folder / "config.yaml").write_text(config)
    for step in steps:
        (folder / "samples").mkdir(exist_ok=True)
        Image.new("L", (2, 2), step).save(folder / "samples" / f"step-{step:08d}.png")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    first = write_run(
        tmp_path / "a" / "demo", [3.0, 1.0], "seed: 0\noutput_dir: a\nmodel: {name: '<N>', depth: 2}\n", (5, 20)
    )
    return [
        first,
        write_run(tmp_path / "b" / "demo", [2.0, 2.0, 1.0], "seed: 1\noutput_dir: b\nmodel: {name: '<N>'}\n"),
    ]


def test_runs_share_the_axes_of_each_curve(runs: list[Path]) -> None:
    """Steps 0 to 20 fill the width from 58 to 430, the values 1 to 3 the height from 224 up to 24."""
    page = render(runs)
    (training,) = re.findall(r"<h2>Training loss</h2>(.*?)</section>", page)
    assert path_of(training, "a/demo") == [(58.0, 24.0), (244.0, 224.0)]
    assert path_of(training, "b/demo") == [(58.0, 124.0), (244.0, 124.0), (430.0, 224.0)]
    assert "<h2>Validation loss by time t: t &lt; ¼ (nearly clean)</h2>" in page
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == ["a/demo, step 20"]
    assert "<script" not in page and not re.search(r"""(src|href)=["'](?!data:)""", page)


def test_settings_that_differ_are_listed(runs: list[Path]) -> None:
    page = render(runs)
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]
    assert cells == [["setting", "a/demo", "b/demo"], ["seed", "0", "1"], ["model.depth", "2", "–"]]
    assert differing_settings({"a": {"x": {"y": 1}}, "b": {"x": {"y": 1}}}) == []


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/r/a/x", "/r/b/x", "/r/c"], ["a/x", "b/x", "c"]),
        (["/x", "/r/x"], ["//x", "r/x"]),
    ],
)
def test_names_tell_runs_apart(paths: list[str], names: list[str]) -> None:
    assert run_names([Path(path) for path in paths]) == names


def test_the_command_writes_one_file_or_says_why_not(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["compare", *map(str, arguments)])
        main()

    out = tmp_path / "new" / "page.html"
    command(*runs, "--out", out)
    assert out.read_text(encoding="utf-8") == render(runs) and capsys.readouterr().out == f"{out}\n"
    for arguments, message in (
        ((runs[0],), "needs at least two different runs"),
        ((runs[0], runs[0]), "needs at least two different runs"),
        ((runs[0], tmp_path), "is no run directory: it has no metrics.jsonl"),
        ((*runs, "--out", tmp_path), "is a directory; give a file"),
    ):
        with pytest.raises(UserError, match=message):
            command(*arguments)
    (runs[1] / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        command(*runs)
