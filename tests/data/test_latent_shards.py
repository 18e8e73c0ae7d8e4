"""Shards of latents: bytes that their content decides, rows by number, and every kind of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gspn_dit.data.image_sources import stratified_split
from gspn_dit.data.latent_shards import (
    FORMAT_VERSION,
    MANIFEST,
    PLAN,
    Shard,
    find_damage,
    open_latents,
    shard_bytes,
    shard_name,
    to_json,
)
from gspn_dit.errors import UserError

SHAPE = (4, 2, 2)


def moments_of(rows: np.ndarray) -> np.ndarray:
    """Row r is filled with r, its mirrored side with -r."""
    values = np.stack([rows, -rows], axis=1).astype(np.float16)
    return np.broadcast_to(values[:, :, None, None, None], (len(rows), 2, *SHAPE)).copy()


def write_latents(directory: Path, count: int = 11, per_shard: int = 4, **changes: object) -> Path:
    """Shards of 4, 4 and 3 rows with labels 0 1 2 0 1 …"""
    directory.mkdir(parents=True)
    entries = []
    for number, start in enumerate(range(0, count, per_shard)):
        rows = np.arange(start, min(start + per_shard, count))
        content = shard_bytes(moments_of(rows), rows % 3, rows, {"skipped": [], "converted": {}})
        (directory / shard_name(number)).write_bytes(content)
        entries.append(Shard(directory / shard_name(number)).entry())
    manifest = {"format_version": FORMAT_VERSION, "latent": {"name": "kl", "vae": "x"}, "class_names": ["a", "b", "c"]}
    (directory / MANIFEST).write_bytes(to_json({**manifest, "shards": entries, **changes}))
    return directory


def values(moments: np.ndarray) -> list[float]:
    assert moments.dtype == np.float16 and moments.shape[1:] == SHAPE
    assert (moments == moments[:, :1, :1, :1]).all()
    return moments[:, 0, 0, 0].tolist()


def test_rows_come_from_all_shards_in_the_order_asked_for(tmp_path: Path) -> None:
    latents = open_latents(write_latents(tmp_path / "set"), validation_fraction=0)
    assert len(latents) == 11 and latents.name == "set" and latents.num_classes == 3
    items = np.array([10, 3, 4, 3, 0, 7, 8])
    mirrored = np.array([False, True, False, False, True, True, False])
    assert values(latents.moments(items, mirrored)) == [10, -3, 4, 3, 0, -7, 8]
    assert latents.labels.tolist() == [row % 3 for row in range(11)]
    assert latents.moments(np.array([], dtype=np.int64), np.array([], dtype=bool)).shape == (0, *SHAPE)


def test_moments_are_mapped_and_not_read(tmp_path: Path) -> None:
    shard = open_latents(write_latents(tmp_path / "set"), validation_fraction=0).shards[0]
    base = shard.moments
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        shard.moments[0, 0, 0, 0, 0] = 1


def test_bytes_are_a_function_of_the_content() -> None:
    rows = np.arange(5)
    facts = {"skipped": ["x"], "converted": {"L": 1, "CMYK": 2}}
    first = shard_bytes(moments_of(rows), rows % 3, rows, facts)
    assert all(shard_bytes(moments_of(rows), rows % 3, rows, facts) == first for _ in range(20))
    other = moments_of(rows)
    other[4, 1, 3, 1, 1] += 1
    assert shard_bytes(other, rows % 3, rows, facts) != first


def test_memory_layout_does_not_matter(tmp_path: Path) -> None:
    moments = np.random.default_rng(0).normal(size=(3, 2, *SHAPE)).astype(np.float16)
    strided = np.asfortranarray(moments)
    rows = np.arange(6)[::2]
    content = shard_bytes(strided, rows, rows, {})
    assert content == shard_bytes(moments, rows.copy(), rows.copy(), {})
    (tmp_path / "shard").write_bytes(content)
    np.testing.assert_array_equal(Shard(tmp_path / "shard").moments, moments)
    assert Shard(tmp_path / "shard").indices.tolist() == [0, 2, 4]


def test_a_shard_of_no_images(tmp_path: Path) -> None:
    rows = np.arange(0)
    (tmp_path / "shard").write_bytes(shard_bytes(moments_of(rows), rows, rows, {"skipped": ["a"], "converted": {}}))
    shard = Shard(tmp_path / "shard")
    assert shard.is_intact() and shard.entry()["images"] == 0 and shard.facts["skipped"] == ["a"]


def test_held_out_images_are_stratified_and_the_rest_is_training(tmp_path: Path) -> None:
    directory = write_latents(tmp_path / "set", count=30, per_shard=8)
    train, validation = (open_latents(directory, split, 0.2) for split in ("train", "validation"))
    rows = [
        np.array(values(part.moments(np.arange(len(part)), np.zeros(len(part), bool)))) for part in (train, validation)
    ]
    assert sorted(np.concatenate(rows).tolist()) == list(range(30))
    assert np.bincount(validation.labels).tolist() == [2, 2, 2]
    assert rows[1].tolist() == sorted(stratified_split(np.arange(30) % 3, 0.2)[1].tolist())
    assert (train.labels == rows[0] % 3).all()
    assert train.fingerprint != validation.fingerprint == open_latents(directory, "validation", 0.2).fingerprint


def test_two_directories_are_the_two_splits(tmp_path: Path) -> None:
    write_latents(tmp_path / "train")
    write_latents(tmp_path / "val", count=5)
    parts = [open_latents(tmp_path, split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [11, 5] and all(part.has_validation for part in parts)
    write_latents(tmp_path / "other" / "train")
    write_latents(tmp_path / "other" / "val", latent={"name": "kl", "vae": "y"})
    with pytest.raises(UserError, match="'latent' of train and val differ; encode both alike"):
        open_latents(tmp_path / "other")


def flip_bit(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [-1, 400])
def test_flipped_bit_is_found_and_the_shard_named(tmp_path: Path, place: int) -> None:
    directory = write_latents(tmp_path / "set")
    manifest = json.loads((directory / MANIFEST).read_text())
    assert not any(find_damage(directory, entry, thorough=True) for entry in manifest["shards"])
    flip_bit(directory / shard_name(1), place)
    found = [find_damage(directory, entry, thorough=True) for entry in manifest["shards"]]
    assert found == [None, f"the shard {directory / shard_name(1)} is damaged (checksum)", None]
    assert not Shard(directory / shard_name(1)).is_intact() and Shard(directory / shard_name(0)).is_intact()


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, r"the shard .*shard-00001\.safetensors is missing"),
        (cut, r"shard-00001\.safetensors has \d+ bytes inste"),
    ],
)
def test_missing_or_short_shard_is_named_when_the_set_is_opened(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    directory = write_latents(tmp_path / "set")
    damage(directory / shard_name(1))
    with pytest.raises(UserError, match=message):
        open_latents(directory)
    assert not Shard(directory / shard_name(1)).is_intact()


def test_what_holds_no_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set data\.path"):
        open_latents(None)
    with pytest.raises(UserError, match="absent does not exist"):
        open_latents(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no encoded latents .*; write them with gspn_dit\.prepare\.encode"):
        open_latents(tmp_path / "empty")
    (tmp_path / "empty" / PLAN).write_text("{}")
    with pytest.raises(UserError, match="it is unfinished: continue with --resume"):
        open_latents(tmp_path / "empty")
    with pytest.raises(UserError, match="has format_version 9, this version reads 1"):
        open_latents(write_latents(tmp_path / "later", format_version=9))
    (tmp_path / "later" / MANIFEST).write_text('{"format_ver')
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        open_latents(tmp_path / "later")
    for content in (b"", b"x" * 100, (200).to_bytes(8, "little") + b"{" * 300):
        (tmp_path / "shard").write_bytes(content)
        with pytest.raises(UserError, match="shard is damaged"):
            _ = Shard(tmp_path / "shard").moments
