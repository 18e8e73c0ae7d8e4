"""What the playground draws, refuses and writes, without its page."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gspn_dit import GSPNPipeline
from gspn_dit.checkpoint import resolve_checkpoint
from gspn_dit.errors import UserError
from gspn_dit.grid import class_grid, side_by_side
from gspn_dit.playground.__main__ import parse_arguments
from gspn_dit.playground.drawing import drawings, read_settings, write_files
from gspn_dit.playground.server import listen, run_pages
from gspn_dit.playground.sources import Settings, TextSource, open_sources
from gspn_dit.sample import parse_arguments as parse_sample
from gspn_dit.sample import run as sample
from tests.captioned import text_config, write_captioned, write_encoder
from tests.tiny import CLASS_NAMES, save_checkpoint, tiny_manifest, tiny_model, write_run
from tests.training.conftest import run_training

SETTINGS = Settings(("cat", "ant"), per_subject=2, seed=5, guidance_scale=1.5, steps=3)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "mine")


def refusal(checkpoints: list[Path], settings: Settings = SETTINGS) -> str:
    with pytest.raises((UserError, ValueError)) as caught:
        list(drawings(open_sources([str(path) for path in checkpoints], "cpu"), settings))
    return str(caught.value)


# -- sources ---------------------------------------------------------------------------------------------------------


def test_every_set_of_weights_is_a_source_averages_first(tmp_path: Path) -> None:
    tensors = {
        name: tiny_model(seed).state_dict() for seed, name in enumerate(("model", "ema", "ema-0.100", "ema-0.050"))
    }
    save_checkpoint(tmp_path / "mine", 7, {**tensors, "optimizer": {}}, tiny_manifest())
    sources = open_sources([str(tmp_path / "mine"), str(tmp_path / "mine"), "builtin:digits"][:2], "cpu")
    assert [source.title for source in sources] == ["mine, EMA", "mine, EMA 0.05", "mine, EMA 0.1", "mine, no average"]
    pictures = [image for _, step, image in drawings(sources, SETTINGS) if step == SETTINGS.steps]
    assert len({image.tobytes() for image in pictures}) == 4


def test_the_last_picture_is_that_of_the_pipeline_and_earlier_ones_are_on_their_way(run_directory: Path) -> None:
    seen = list(drawings(open_sources([str(run_directory)], "cpu")[:1], SETTINGS))
    pipeline = GSPNPipeline.from_checkpoint(run_directory)
    images = pipeline(["cat"] * 2 + ["ant"] * 2, 3, 1.5, seed=5, output_type="np").images
    number, step, last = seen[-1]
    assert (number, step) == (0, 3)
    assert np.array_equal(last, class_grid(images, [0, 0, 1, 1], ["cat", "ant"]))
    assert seen[0][1] == 1 and seen[0][2].size == last.size and seen[0][2].tobytes() != last.tobytes()


def test_another_size_is_drawn_where_the_model_has_no_positions(run_directory: Path, tmp_path: Path) -> None:
    (source, *_) = open_sources([str(run_directory)], "cpu")
    assert source.any_size
    shapes = []
    larger = Settings(("cat",), 1, 0, 1.0, 2, height=8, width=6)
    images = source.draw(larger, lambda step, decode: shapes.append(decode().shape))
    assert images.shape == (1, 8, 6, 1) and shapes == [(1, 8, 6, 1)] * 2
    assert "height is 3 pixels, but must be a positive multiple of 2" in refusal(
        [run_directory], Settings(("cat",), 1, 0, 1, 1, 3)
    )


def test_a_model_by_prompt(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers (pip install 'gspn-dit[text]')")
    places = write_captioned(tmp_path / "data"), write_encoder(tmp_path / "encoder")
    run_training(text_config(tmp_path / "run", *places, max_steps=1, ema_decay=0.0))
    (source, *_) = open_sources([str(tmp_path / "run")], "cpu")
    assert isinstance(source, TextSource) and source.class_names == []
    settings = Settings(("a cat", "a dog"), 1, 3, 2.0, 2)
    steps = []
    images = source.draw(settings, lambda step, decode: steps.append((step, decode())))
    assert [step for step, _ in steps] == [1, 2] and np.array_equal(steps[-1][1], images)
    assert source.draw(Settings(("a cat",), 1, 3, 2.0, 1, 16, 8), lambda step, decode: None).shape == (1, 16, 8, 3)
    assert "height is 9 pixels" in refusal([tmp_path / "run"], Settings(("a cat",), 1, 3, 2.0, 1, 9))
    by_class = write_run(tmp_path / "by_class")
    assert "by_class by class; start a playground for each" in refusal([tmp_path / "run", by_class])
    command = source.describe(settings)["command"]
    assert shlex.split(command)[2:8] == [
        "--checkpoint",
        str(tmp_path / "run"),
        *("--weights", "ema", "--prompt", "a cat"),
    ]


def test_what_cannot_be_compared_is_refused(run_directory: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", class_names=["a", "b", "c", "d", "e"])
    assert "have different classes; start a playground for each" in refusal([run_directory, other])
    assert "does not exist" in refusal([tmp_path / "nowhere"])
    assert "does not draw images" in refusal([write_run(tmp_path / "classifier", latent=None)])


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, message",
    [
        (([], 1, 0, 1, 1), "there is nothing to draw"),
        (("\n  \n", 1, 0, 1, 1), "there is nothing to draw"),
        ((["cat"], 0, 0, 1, 1), "images of each: 0, but must be 1 to 64"),
        ((["cat"], 1, None, 1, 1), "seed is empty; give a number"),
        ((["cat"], 1, -1, 1, 1), "seed: -1, but must lie in"),
        ((["cat"], 1, 0, -1, 1), "guidance scale is -1.0, but must be at least 0"),
        ((["cat"], 1, 0, 1, 0), "steps: 0, but must be 1 to 1,000"),
        ((CLASS_NAMES, 13, 0, 1, 1), "65 images are more than the 64 that are drawn at once"),
    ],
)
def test_a_form_that_asks_for_what_cannot_be(form: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_settings(*form)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_a_form_is_read() -> None:
    assert read_settings(" a cat \n\na dog", 2, 5, 1.5, 3, 0, 16) == Settings(
        ("a cat", "a dog"), 2, 5, 1.5, 3, None, 16
    )


def test_the_settings_beside_a_grid_draw_it_again(run_directory: Path, tmp_path: Path) -> None:
    (source, *_) = open_sources([str(run_directory)], "cpu")
    ((*_, grid),) = [each for each in drawings([source], SETTINGS) if each[1] == 3]
    first, other = (write_files(tmp_path, SETTINGS, [source], {source.title: grid}) for _ in range(2))
    assert first[0].parent != other[0].parent
    noted = json.loads(first[1].read_text())
    assert noted["classes"] == ["cat", "ant"] and noted["drawn_by"][0]["step"] == 100
    _, _, *words = shlex.split(noted["drawn_by"][0]["command"])
    sample(parse_sample([*words, "--out", str(tmp_path / "again.png"), "--device", "cpu"]))
    rows = [grid.crop((0, top, grid.width, top + 50)) for top in (2, 52)]  # sample.py orders rows by class
    again = Image.open(tmp_path / "again.png")
    assert [again.crop((0, top, grid.width, top + 50)).tobytes() for top in (52, 2)] == [row.tobytes() for row in rows]
    larger = Settings(("cat",), 1, 0, 1.0, 2, height=8)
    assert "command" not in source.describe(larger)


def test_grids_side_by_side_keep_their_pixels() -> None:
    left, right = Image.new("RGB", (60, 20), "red"), Image.new("RGB", (40, 30), "blue")
    joined = side_by_side({"a": left, "b": right})
    assert joined.size == (60 + 8 + 40, 24 + 30)
    assert joined.getpixel((0, 24)) == (255, 0, 0) and joined.getpixel((68, 53)) == (0, 0, 255)
    assert joined.getpixel((64, 30)) == joined.getpixel((0, 50)) == (255, 255, 255)


# -- the command line ------------------------------------------------------------------------------------------------


def test_pages_of_runs_are_found(run_directory: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine")
    assert run_pages([str(run), "builtin:digits"]) == []
    for file in (run / "index.html", run / "report" / "index.html"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("<html></html>")
    expected = [("mine: run", run / "index.html"), ("mine: report", run / "report" / "index.html")]
    assert run_pages([str(run)]) == run_pages([str(resolve_checkpoint(run))]) == expected


def test_a_port_that_is_taken_and_one_that_is_none() -> None:
    with (
        listen("127.0.0.1", 0) as taken,
        pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:.*give another --port"),
    ):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="--port is 70000, but must lie in"):
        parse_arguments(["--port", "70000"])
    assert parse_arguments([]).checkpoint == ["builtin:digits"]
