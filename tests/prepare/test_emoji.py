"""Emoji as a captioned set: what npm's packages become, how it is split, and what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gspn_dit.data.images import load_images
from gspn_dit.prepare.emoji import Emoji, Packages, assign_splits, draw, read_pictures

pytest.importorskip("resvg_py", reason="drawing SVG needs resvg-py (pip install 'gspn-dit[text]')")

GROUPS = {"1": "people-body", "2": "component", "3": "animals-nature"}
CAT = {"label": "cat", "hexcode": "1F408-FE0F", "group": 3, "tags": ["animal", "cat", "cats", "kitten"]}
DOG = {"label": "dog", "hexcode": "1F415", "group": 3, "tags": ["pet"]}
TONE = {"label": "light skin tone", "hexcode": "1F3FB", "group": 2, "tags": []}
HAND = {
    "label": "hand",
    "hexcode": "270B",
    "group": 1,
    "tags": ["five"],
    "skins": [{"label": "hand: light skin tone", "hexcode": "270B-1F3FB"}],
}
RED, BLUE = '<rect width="8" height="8" fill="red"/>', '<rect width="4" height="8" fill="blue"/>'


def icon_set(name: str, icons: dict[str, Any], chars: dict[str, str]) -> dict[str, Any]:
    info = {"name": name.title(), "author": {"name": f"{name}'s author", "url": "https://example.org"}}
    return {
        "icons.json": {"prefix": name, "icons": icons, "width": 8, "height": 8},
        "chars.json": chars,
        "info.json": {**info, "license": {"spdx": "CC-BY-4.0", "url": "https://example.org/licence"}},
        "package.json": {"version": "1.2.3"},
    }


CONTENT = {
    "@iconify-json/noto": icon_set(
        "noto",
        {
            "cat": {"body": RED},
            "hound": {"body": BLUE},
            "hand": {"body": RED + BLUE},
            "pale": {"body": BLUE + RED},
        },
        {"1f408": "cat", "1f415": "hound", "270b": "hand", "270b-1f3fb": "pale", "1f3fb": "pale"},
    ),
    # This one lists no codes, as two of the real sets do not: its icons are known by the names of others.
    "@iconify-json/emojione": icon_set(
        "emojione", {"cat": {"body": BLUE}, "hound": {"body": BLUE}, "logo": {"body": RED}}, {}
    ),
    "emojibase-data": {
        "en/data.json": [CAT, DOG, HAND, TONE],
        "meta/groups.json": {"groups": GROUPS},
        "package.json": {"version": "17.0.0"},
    },
}


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """The packages as `npm install` leaves them, one of them as an archive of `npm pack`."""
    folder = tmp_path / "packages"
    for package, files in CONTENT.items():
        for name, content in files.items():
            path = folder / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    return folder


def pack(packages: Path, name: str, version: str = "1.2.3") -> Path:
    archive = packages / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    with tarfile.open(archive, "w:gz") as file:
        for path in sorted((packages / name).rglob("*.json")):
            file.add(path, f"package/{path.relative_to(packages / name)}")
    return archive


def prepare(packages: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "gspn_dit.prepare.emoji",
        "--packages",
        str(packages),
        "--out",
        str(out),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_set_is_an_image_folder_with_captions(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    result = prepare(packages, out, "--size", "16")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for path in sorted(out.glob("*/metadata.jsonl")) for line in path.open()]
    pictures = {(row["style"], row["code"]): row for row in rows}
    assert set(pictures) == {("noto", code) for code in ("1f408", "1f415", "270b")} | {("emojione", "1f408")}
    cat = pictures["noto", "1f408"]  # of emojione's equal pictures of cat and dog, the first alone is kept
    assert cat["text"] == "cat, noto style"
    assert cat["texts"] == ["cat, noto style", "cat, animal, kitten, noto style", "animal, kitten, noto style"]
    assert cat["group"] == "animals-nature" and cat["label"] == "cat"
    image = next(out.glob(f"*/{cat['file_name']}"))
    assert np.array_equal(np.asarray(Image.open(image)), np.full((16, 16, 3), (255, 0, 0)))
    text = (out / "ATTRIBUTION.md").read_text()
    for part in ("Noto (@iconify-json/noto 1.2.3) by noto's author", "CC-BY-4.0", "emojibase-data 17.0.0, MIT"):
        assert part in text
    assert not list(tmp_path.glob("*.partial"))


def test_its_groups_are_classes_of_an_image_folder(packages: Path, tmp_path: Path) -> None:
    assert prepare(packages, tmp_path / "emoji", "--size", "8").returncode == 0
    images = load_images("imagefolder", tmp_path / "emoji", "train", None, 0.0)
    assert set(images.class_names) <= set(GROUPS.values()) and images.image_size == 8


def test_archives_of_npm_pack_are_read_as_well(packages: Path) -> None:
    folder = read_pictures(Packages(packages), ["noto"], [], False)
    pack(packages, "@iconify-json/noto")
    (packages / "@iconify-json/noto").rename(packages / "moved")
    assert read_pictures(Packages(packages), ["noto"], [], False) == folder


def test_skin_tones_are_left_out_unless_asked_for(packages: Path) -> None:
    codes = {
        tones: [picture.emoji.code for picture in read_pictures(Packages(packages), ["noto"], ["people-body"], tones)]
        for tones in (False, True)
    }
    assert codes == {False: ["270b"], True: ["270b", "270b-1f3fb"]}


def test_splits_go_by_base_emoji() -> None:
    """No emoji of a base in `validation` is elsewhere; every pair's caption and design are both in `train`."""
    styles = ["noto", "twemoji", "openmoji"]
    emoji = [Emoji(f"{code:x}", f"name {code}", (), "objects") for code in range(0x1F400, 0x1F400 + 400)]
    splits = [assign_splits(one, styles) for one in emoji]
    whole = [set(of.values()) for of in splits]
    assert 20 < whole.count({"validation"}) < 60  # a tenth of 400
    assert 45 < whole.count({"train", "pairs"}) < 105  # a fifth of the rest
    assert all(of in ({"validation"}, {"train"}, {"train", "pairs"}) for of in whole)
    assert all(list(of.values()).count("pairs") <= 1 for of in splits)
    assert {style for of in splits for style in styles if of[style] == "pairs"} == set(styles)


def test_gender_and_skin_tone_share_a_base() -> None:
    codes = ("1f468-200d-1f680", "1f469-1f3fd-200d-1f680", "1f9d1-200d-1f680")
    assert {Emoji(code, "astronaut", (), "people-body").base for code in codes} == {"1f9d1-1f680"}
    assert Emoji("1f6a3-200d-2642", "man rowing boat", (), "people-body").base == "1f6a3"


@pytest.mark.parametrize(
    "width, height, white", [(8, 4, (slice(0, 4), slice(None))), (4, 8, (slice(None), slice(0, 4)))]
)
def test_oblong_pictures_are_centred_on_white(width: int, height: int, white: Any) -> None:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="8" height="8" fill="#00f"/></svg>'
    pixels = np.asarray(Image.open(io.BytesIO(draw(svg, 16))))
    assert pixels.shape == (16, 16, 3)
    assert (pixels[white] == 255).all() and (pixels[8, 8] == (0, 0, 255)).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "4"], "--size is 4, but must be at least 8"),
        (["--styles", "klingon"], "unknown design klingon; allowed are noto, twemoji"),
        (["--groups", "gods"], "--groups has gods, but can hold animals-nature, people-body"),
        (["--styles", "twemoji"], "has no package @iconify-json/twemoji; run there: npm pack @iconify-json/twemoji"),
    ],
)
def test_what_is_refused(packages: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = prepare(packages, tmp_path / "out", *arguments)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_packages_name_the_command_that_gets_them(tmp_path: Path) -> None:
    for folder, message in ((tmp_path, "has no set of emoji; run there: npm pack"), (tmp_path / "no", "npm pack")):
        result = prepare(folder, tmp_path / "out")
        assert result.returncode == 2 and message in result.stderr and "emojibase-data" in result.stderr


def test_damaged_and_doubled_packages(packages: Path, tmp_path: Path) -> None:
    (packages / "@iconify-json/noto/icons.json").write_text("{")
    result = prepare(packages, tmp_path / "out", "--styles", "noto")
    assert result.returncode == 2 and "has no readable icons.json" in result.stderr
    pack(packages, "@iconify-json/noto", "1.2.3")
    pack(packages, "@iconify-json/noto", "1.2.4")
    (packages / "@iconify-json/noto").rename(packages / "moved")
    result = prepare(packages, tmp_path / "out", "--styles", "noto")
    assert result.returncode == 2 and "several versions of @iconify-json/noto" in result.stderr
