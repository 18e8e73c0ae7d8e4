"""Encoding: what the shards hold, what interrupts it, and what cannot be encoded."""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image

from gspn_dit import files
from gspn_dit.data.images import load_images
from gspn_dit.data.latent_shards import MANIFEST, PLAN, Shard, open_latents, read_manifest, shard_name
from gspn_dit.data.latents import AutoencoderLatent
from gspn_dit.data.vae import load_vae
from gspn_dit.errors import LocalUserError, UserError
from gspn_dit.prepare import encode, encode_check, encode_plan, job
from gspn_dit.prepare.encode import parse_arguments
from gspn_dit.prepare.encoder import Encoder
from tests.data.tiny_vae import SIZE, image_of, write_folder, write_vae

COUNT = 13
"""Images of the folder: shards of 4, 4, 4 and 1."""


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `vae`, another one `other`, `images`, and their latents `whole`."""
    directory = tmp_path_factory.mktemp("encode")
    write_vae(directory / "vae")
    write_vae(directory / "other", seed=1)
    write_folder(directory / "images", COUNT)
    AcceleratorState._reset_state(reset_partial_state=True)
    run(directory, "whole")
    return directory


def arguments(place: Path, out: str, *more: str, images: str = "images", vae: str = "vae") -> list[str]:
    return [
        *("--source", f"imagefolder:{place / images}", "--vae", str(place / vae), "--image-size", str(SIZE)),
        *("--out", str(place / out), "--shard-images", "4", "--batch-size", "3", "--workers", "2", *more),
    ]


def run(place: Path, out: str, *more: str, **options: str) -> Path:
    """Encode into `out` and return it."""
    encode.run(parse_arguments(arguments(place, out, *more, **options)))
    return place / out


def content_of(directory: Path) -> dict[str, str]:
    """Hash of every file by name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def test_shards_hold_the_moments_of_the_images_and_of_their_mirror_images(place: Path) -> None:
    latents = open_latents(place / "whole", validation_fraction=0)
    images = load_images("imagefolder", place / "images", validation_fraction=0)
    latent = AutoencoderLatent(load_vae(place / "vae"), SIZE, "x")
    pixels = images.pixels()
    for side, expected in enumerate((pixels, pixels[:, :, ::-1])):
        moments = latents.moments(np.arange(COUNT), np.full(COUNT, side, dtype=bool))
        np.testing.assert_allclose(moments, latent.moments(expected).numpy(), rtol=2e-3, atol=2e-3)
    assert latents.labels.tolist() == images.labels.tolist() and latents.class_names == ["ant", "bee"]
    assert [len(shard.labels) for shard in latents.shards] == [4, 4, 4, 1]
    assert np.concatenate([shard.indices for shard in latents.shards]).tolist() == list(range(COUNT))


def test_manifest_says_what_was_encoded_and_how(place: Path) -> None:
    manifest = read_manifest(place / "whole")
    assert manifest["source"]["name"] == f"imagefolder:{place / 'images'}"
    assert (manifest["source"]["images"], manifest["images"], manifest["skipped"]) == (COUNT, COUNT, [])
    assert manifest["latent"] == AutoencoderLatent(load_vae(place / "vae"), SIZE, str(place / "vae")).spec()
    assert manifest["vae_config"]["latent_channels"] == 2 and manifest["class_names"] == ["ant", "bee"]
    assert manifest["transform"] == {
        "crop": "ADM centre crop",
        "image_size": SIZE,
        "flips": [False, True],
        "precision": "float32",
        "batch_size": 3,
    }
    digests = content_of(place / "whole")
    assert {entry["file"]: entry["sha256"] for entry in manifest["shards"]} == {
        name: digest for name, digest in digests.items() if name.startswith("shard-")
    }
    assert sorted(digests) == [MANIFEST, *(shard_name(number) for number in range(4))]


def test_two_encodings_are_bit_identical(place: Path) -> None:
    assert content_of(run(place, "again")) == content_of(place / "whole")


def test_number_of_threads_does_not_matter(place: Path) -> None:
    """A convolution that two threads share rounds otherwise than that of one; this autoencoder shows it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 64, 64),
            norm_num_groups=16,
        ).save_pretrained(place / "wide")
    threads, contents = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            AcceleratorState._reset_state(reset_partial_state=True)
            out = run(place, f"threads-{number}", "--image-size", "32", vae="wide")
            assert torch.get_num_threads() == number
            contents.append(content_of(out))
    finally:
        torch.set_num_threads(threads)
    assert contents[0] == contents[1]


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 5])
def test_killed_and_resumed_is_bit_identical(place: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Files are written in this order: plan, four shards, manifest. Death may also come before the plan goes."""

    class Killed(BaseException):
        pass

    out = f"killed-{calls}"
    with monkeypatch.context() as patch:
        written: list[str] = []

        def write(path: Path, content: bytes) -> None:
            if len(written) == calls:
                (path.parent / f".{path.name}.17.tmp").write_bytes(content[: len(content) // 2])
                raise Killed
            written.append(path.name)
            files.write_atomically(path, content)

        patch.setattr(job, "write_atomically", write)
        with pytest.raises(Killed):
            run(place, out)
    assert not (place / out / MANIFEST).exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert content_of(run(place, out, "--resume")) == content_of(place / "whole")


def test_resume_encodes_what_lacks_alone(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run(place, "part")
    (place / "part" / shard_name(2)).unlink()
    damaged = place / "part" / shard_name(1)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    encoded: list[int] = []
    original = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, number: encoded.append(number) or original(self, number))
    AcceleratorState._reset_state(reset_partial_state=True)
    run(place, "part", "--resume")
    assert sorted(encoded) == [1, 2]
    assert content_of(place / "part") == content_of(place / "whole")
    AcceleratorState._reset_state(reset_partial_state=True)
    run(place, "part", "--resume")
    assert sorted(encoded) == [1, 2] and "is complete: nothing to do" in capsys.readouterr().out


def test_directory_in_use_is_not_overwritten(place: Path) -> None:
    with pytest.raises(UserError, match="holds encoded latents already; --verify checks them"):
        parse_arguments(arguments(place, "whole"))
    (place / "begun").mkdir()
    (place / "begun" / PLAN).write_text("{}")
    with pytest.raises(UserError, match="holds an unfinished encoding; continue with --resume"):
        parse_arguments(arguments(place, "begun"))
    with pytest.raises(UserError, match="was begun with format_version = None, now it is 1"):
        run(place, "begun", "--resume")
    (place / "begun" / PLAN).write_text('{"format')
    with pytest.raises(UserError, match=r"plan\.json cannot be read"):
        run(place, "begun", "--resume")
    with pytest.raises(UserError, match="is not empty and holds no latents"):
        parse_arguments(arguments(place, "images"))
    with pytest.raises(UserError, match="is a file; give a directory"):
        parse_arguments(arguments(place, "vae/config.json"))


def test_manifest_of_another_vae_source_or_option_is_refused_by_name(place: Path) -> None:
    before = content_of(place / "whole")
    with pytest.raises(UserError, match=r"was begun with another VAE: .*vae \(hash .*but given is .*other \(hash"):
        run(place, "whole", "--resume", vae="other")
    with pytest.raises(UserError, match=r"was begun with transform\.batch_size = 3, now it is 5"):
        run(place, "whole", "--resume", "--batch-size", "5")
    write_folder(place / "more", COUNT + 1)
    with pytest.raises(UserError, match=r"was begun with source\.images = 13, now it is 14"):
        run(place, "whole", "--resume", images="more")
    assert content_of(place / "whole") == before


def bad_folder(directory: Path) -> Path:
    """Eight images: JPEGs in grey, CMYK and RGB, a PNG with a palette; one JPEG cut short, one file that is none."""
    for number, mode in enumerate(("L", "CMYK", "RGB", "CMYK", "RGB", "RGB")):
        folder = directory / ("ant" if number % 2 else "bee")
        folder.mkdir(parents=True, exist_ok=True)
        image_of(number, 40, mode).save(folder / f"{number}.jpg")
    image_of(7, 40, "P").save(directory / "ant" / "7.png")
    buffer = io.BytesIO()
    image_of(8, 40, "RGB").save(buffer, "JPEG")
    (directory / "ant" / "8.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (directory / "bee" / "9.jpg").write_bytes(b"not an image")
    return directory


def test_truncated_image_is_named_and_nothing_pretends_to_be_complete(place: Path) -> None:
    bad_folder(place / "bad")
    with pytest.raises(
        LocalUserError, match=r"cannot read the image .*ant/8\.jpg: .*\(unreadable images: 1, --skip-bad allows 0\)"
    ):
        run(place, "of bad", images="bad")
    assert sorted(path.name for path in (place / "of bad").iterdir()) == [PLAN, shard_name(0)]


def test_bad_images_are_left_out_on_request_and_conversions_counted(place: Path, capsys: Any) -> None:
    write_vae(place / "rgb", image_channels=3)
    bad_folder(place / "bad to skip")
    options = {"images": "bad to skip", "vae": "rgb"}
    with pytest.raises(LocalUserError, match=r"bee/9\.jpg: .*unreadable images: 2, --skip-bad allows 1"):
        run(place, "skipped", "--skip-bad", "1", **options)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError, match="--skip-bad allows 0"):  # those of finished shards count as well
        run(place, "skipped", "--resume", **options)
    AcceleratorState._reset_state(reset_partial_state=True)
    run(place, "skipped", "--resume", "--skip-bad", "2", **options)
    manifest = read_manifest(place / "skipped")
    assert manifest["converted"] == {"CMYK": 2, "L": 1, "P": 1} and manifest["images"] == 7
    assert ["ant/8.jpg" in manifest["skipped"][0], "bee/9.jpg" in manifest["skipped"][1]] == [True, True]
    told = capsys.readouterr().out
    assert "converted to RGB: 2 of mode CMYK, 1 of mode L, 1 of mode P" in told and told.count("left out: ") == 2
    latents = open_latents(place / "skipped", validation_fraction=0)
    kept = np.concatenate([shard.indices for shard in latents.shards])
    assert kept.tolist() == [0, 1, 2, 3, 5, 6, 7]  # 4 is ant/8.jpg, 8 is bee/9.jpg
    images = load_images("imagefolder", place / "bad to skip", None, SIZE, channels=3)
    expected = AutoencoderLatent(load_vae(place / "rgb"), SIZE, "x").moments(images.pixels(kept)).numpy()
    actual = latents.moments(np.arange(7), np.zeros(7, dtype=bool))
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-3)


def test_a_set_without_a_readable_image_has_no_manifest(place: Path) -> None:
    (place / "none" / "c").mkdir(parents=True)
    (place / "none" / "c" / "0.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"none of the 1 images could be read; the first: .*0\.png"):
        run(place, "of none", "--skip-bad", "3", images="none")
    assert not (place / "of none" / MANIFEST).exists()


def test_empty_class_folder_is_named_before_anything_is_written(place: Path) -> None:
    write_folder(place / "hollow")
    (place / "hollow" / "cow").mkdir()
    with pytest.raises(UserError, match=r"class folder .*cow has no images"):
        run(place, "of hollow", images="hollow")
    assert not (place / "of hollow").exists()


def test_no_image_is_decoded_before_its_shard(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a set of a million images must not read them."""
    opened: list[Any] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda file, *rest: opened.append(file) or original(file, *rest))
    images = encode_plan.open_images(f"imagefolder:{place / 'images'}", "train", SIZE, 1)
    encode_plan.source_fingerprint(images)
    assert len(images) == COUNT and not opened


@pytest.mark.parametrize("writes", [0, 2, 5])
def test_full_disk_is_told_in_one_line_and_leaves_whole_files(
    place: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    out, opened = f"full-{writes}", []

    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(bytes(content)[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_(path: Any, mode: str = "r", *rest: Any) -> Any:
        if mode == "rb":  # a shard that is whole is read once more, for its hash
            return builtins.open(path, mode, *rest)
        opened.append(path)
        return Full(path, mode.replace("b", "")) if len(opened) > writes else builtins.open(path, mode, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", open_, raising=False)
        with pytest.raises(UserError, match="No space left on device") as caught:
            run(place, out)
    assert "\n" not in str(caught.value)
    left = content_of(place / out)
    assert sorted(left) == sorted([PLAN, *(shard_name(number) for number in range(4))][:writes])
    whole = content_of(place / "whole")
    assert all(whole[name] == digest for name, digest in left.items() if name != PLAN)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert content_of(run(place, out, "--resume")) == whole


def test_verify_hashes_and_shows_a_few_images(place: Path, capsys: Any) -> None:
    out = run(place, "checked")
    encode_check.verify(parse_arguments(["--out", str(out), "--verify"]))
    told = capsys.readouterr().out
    assert "4 shards with 13 images are as they were written" in told and "PSNR" in told
    picture = np.asarray(Image.open(out / "verify.png"))
    assert picture.shape == (2 * SIZE, 8 * SIZE)
    images = load_images("imagefolder", place / "images", validation_fraction=0)
    np.testing.assert_array_equal(picture[:SIZE, :SIZE], images.pixels([0])[0, :, :, 0])
    np.testing.assert_array_equal(picture[:SIZE, -SIZE:], images.pixels([COUNT - 1])[0, :, :, 0])


def test_verify_names_a_damaged_shard_and_another_vae_or_source(place: Path) -> None:
    out = run(place, "flipped")
    with pytest.raises(UserError, match="but given is the VAE"):
        encode_check.verify(parse_arguments(["--out", str(out), "--verify", "--vae", str(place / "other")]))
    write_folder(place / "others", COUNT, ("ant", "bee"), mode="1")
    with pytest.raises(UserError, match="does not hold the images that"):
        source = f"imagefolder:{place / 'others'}"
        encode_check.verify(parse_arguments(["--out", str(out), "--verify", "--source", source]))
    shard = out / shard_name(2)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00002\.safetensors is damaged \(checksum\); delete it and encode it a"):
        encode_check.verify(parse_arguments(["--out", str(out), "--verify"]))


def test_bfloat16_is_recorded_and_near(place: Path) -> None:
    out = run(place, "bf16", "--precision", "bf16")
    assert read_manifest(out)["transform"]["precision"] == "bf16"
    every, no = np.arange(COUNT), np.zeros(COUNT, dtype=bool)
    exact, near = (open_latents(path, validation_fraction=0).moments(every, no) for path in (place / "whole", out))
    assert (exact != near).any()
    np.testing.assert_allclose(near.astype(float), exact.astype(float), atol=0.1)


def test_values_beyond_float16_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = AutoencoderLatent.moments
    monkeypatch.setattr(AutoencoderLatent, "moments", lambda self, images, size: original(self, images, size) * 1e9)
    with pytest.raises(UserError, match="encodes images to values that float16 cannot hold"):
        run(place, "large")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x"], "--source is missing"),
        (["--out", "x", "--source", "digits"], "--vae is missing"),
        (["--out", "x", "--source", "digits", "--vae", "v", "--image-size", "0"], "--image-size is 0"),
        (["--out", "x", "--source", "digits", "--vae", "v", "--skip-bad", "-1"], "--skip-bad is -1"),
        (["--out", "x", "--verify", "--resume"], "contradict each other"),
        (["--out", "x", "--sources", "digits"], "unknown argument --sources; did you mean '--source'"),
    ],
)
def test_wrong_arguments_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arguments(words)


def test_unknown_source_is_refused(place: Path) -> None:
    for source in ("zip:a", "imagefolder:", "digit"):
        with pytest.raises(UserError, match=f"--source {source} is unknown; give imagefolder:DIR"):
            encode.run(parse_arguments([*arguments(place, "unknown")[2:], "--source", source]))
        AcceleratorState._reset_state(reset_partial_state=True)


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    began = time.process_time()
    command = [sys.executable, "-X", "importtime", "-m", "gspn_dit.prepare.encode", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--skip-bad N" in done.stdout and time.process_time() - began < 3
    modules = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not modules & {"torch", "diffusers", "datasets", "accelerate"}


def test_facts_of_a_shard_are_with_it(place: Path) -> None:
    assert Shard(place / "whole" / shard_name(3)).facts["skipped"] == []
    assert json.loads((place / "whole" / MANIFEST).read_text())["shard_images"] == 4
