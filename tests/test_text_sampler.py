"""Drawing by prompt: from a checkpoint, by the command line, and independent of the company an image is drawn in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gspn_dit.diffusion import Guidance
from gspn_dit.errors import UserError
from gspn_dit.sample import parse_arguments, run
from gspn_dit.text_sampler import TextSampler
from tests.captioned import text_config, write_captioned, write_encoder
from tests.tiny import write_run
from tests.training.conftest import run_training

pytest.importorskip("transformers", reason="needs transformers (pip install 'gspn-dit[text]')")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text_run")
    places = write_captioned(folder / "data"), write_encoder(folder / "encoder")
    run_training(text_config(folder / "run", *places, max_steps=2, ema_decay=0.0))
    return folder / "run"


def test_an_image_depends_on_its_index_seed_and_prompt_alone(checkpoint: Path) -> None:
    sampler = TextSampler.from_checkpoint(checkpoint)
    options = {"steps": 3, "guidance": Guidance(2.0)}
    images = sampler.draw(["a cat", "a dog", "a cat"], **options)
    assert images.shape == (3, 8, 8, 3) and images.dtype == np.uint8
    assert np.array_equal(sampler.draw(["a dog"], first=1, **options)[0], images[1])
    assert not np.array_equal(sampler.draw(["a cat"], first=1, **options)[0], images[1])
    assert not np.array_equal(images[0], images[2])
    assert not np.array_equal(sampler.draw(["a cat"], seed=1, **options)[0], images[0])


def test_the_command_writes_captions_beside_images(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("a dog\n\n")
    arguments = ["--checkpoint", str(checkpoint), "--prompt", "a cat", "--prompts", str(tmp_path / "more.txt")]
    arguments += ["--per-class", "2", "--steps", "2", "--order", "interleaved", "--out", str(tmp_path / "grid.png")]
    run(parse_arguments([*arguments, "--save-images", str(tmp_path / "out"), "--save-npz", str(tmp_path / "set.npz")]))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").open()]
    assert [row["text"] for row in rows] == ["a cat", "a dog", "a cat", "a dog"]
    saved = np.load(tmp_path / "set.npz", allow_pickle=False)
    assert saved["captions"].tolist() == ["a cat", "a dog", "a cat", "a dog"]
    for row, image in zip(rows, saved["arr_0"], strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / row["file_name"])), image)
    again = ["--checkpoint", str(checkpoint), "--prompts", str(tmp_path / "out" / "metadata.jsonl")]
    run(parse_arguments([*again, "--per-class", "1", "--steps", "2", "--save-npz", str(tmp_path / "again.npz")]))
    assert np.array_equal(np.load(tmp_path / "again.npz")["arr_0"], saved["arr_0"])


def test_the_command_draws_other_sizes(checkpoint: Path, tmp_path: Path) -> None:
    out = ["--checkpoint", str(checkpoint), "--prompt", "a cat", "--per-class", "1", "--steps", "2"]
    out += ["--save-npz", str(tmp_path / "set.npz"), "--size"]
    run(parse_arguments([*out, "4x12"]))
    drawn = TextSampler.from_checkpoint(checkpoint).draw(["a cat"], 2, Guidance(2.0), height=4, width=12)
    assert np.array_equal(np.load(tmp_path / "set.npz")["arr_0"], drawn) and drawn.shape == (1, 4, 12, 3)
    (tmp_path / "set.npz").unlink()
    with pytest.raises(UserError, match="width is 13 pixels, but must be a positive multiple of 2"):
        run(parse_arguments([*out, "4x13"]))
    assert not list(tmp_path.iterdir())


def test_what_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "grid.png")]
    with pytest.raises(UserError, match="--prompt is empty"):
        parse_arguments(["--checkpoint", str(checkpoint), "--prompt", " ", *out])
    with pytest.raises(UserError, match="--prompt does not go with --classes"):
        parse_arguments(["--checkpoint", str(checkpoint), "--prompt", "a", "--classes", "0", *out])
    with pytest.raises(UserError, match=r"nothing\.txt cannot be read"):
        parse_arguments(["--checkpoint", str(checkpoint), "--prompts", str(tmp_path / "nothing.txt"), *out])
    with pytest.raises(UserError, match="draws by prompt, not by class; give --prompt"):
        run(parse_arguments(["--checkpoint", str(checkpoint), *out]))
    by_class = write_run(tmp_path / "by_class")
    with pytest.raises(UserError, match="is not of task text-to-image, so it takes no prompt"):
        run(parse_arguments(["--checkpoint", str(by_class), "--prompt", "a cat", *out]))
