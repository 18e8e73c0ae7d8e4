"""Features of real images that are kept: under the hash of images and weights, whole or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fid import cache as cache_module
from fid.cache import cache_key, extract_cached
from fid.distributed import World
from fid.extraction import extract_all
from fid.images import LabelledImages
from gspn_dit.errors import UserError
from tests.fid.conftest import noise_images, tiny_net

OPTIONS = {"batch_size": 8, "world": World(), "device": "cpu"}


def test_what_is_kept_is_what_was_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = LabelledImages(noise_images(20, 0), "here", np.arange(20))
    nets = [tiny_net(), dataclasses.replace(tiny_net(layers=("features",)), sha256="1" * 64)]
    first, sha256 = extract_cached(images, nets, tmp_path, **OPTIONS)
    assert sha256 == images.sha256 and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(cache_module, "extract_all", lambda *_, **__: pytest.fail("recomputed"))
    again, other = extract_cached(dataclasses.replace(images, source="there"), nets, tmp_path, **OPTIONS)
    assert other == sha256
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.features, two.features)
        assert (one.logits is None) == (two.logits is None)
        for layer in one.moments:
            assert torch.equal(one.moments[layer].covariance, two.moments[layer].covariance)
            assert one.moments[layer].count == two.moments[layer].count


def test_other_images_and_other_weights_have_other_keys() -> None:
    images, net = LabelledImages(noise_images(20, 0), "x"), tiny_net()
    changed = images.pixels.copy()
    changed[3, 0, 0, 0] ^= 1
    keys = {
        cache_key(images.sha256, net),
        cache_key(LabelledImages(changed, "x").sha256, net),
        cache_key(images.sha256, dataclasses.replace(net, sha256="1" * 64)),
        cache_key(images.sha256, dataclasses.replace(net, description={"resize": "other"})),
        cache_key(images.sha256, tiny_net(layers=("features",))),
    }
    assert len(keys) == 5


@pytest.mark.parametrize("content", [b"", b"half", b"\x80\x04N."])
def test_a_damaged_file_is_computed_again(tmp_path: Path, content: bytes) -> None:
    images, net = LabelledImages(noise_images(12, 0), "x"), tiny_net()
    expected, _ = extract_cached(images, [net], tmp_path, **OPTIONS)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(content)
    found, _ = extract_cached(images, [net], tmp_path, **OPTIONS)
    assert torch.equal(found[0].features, expected[0].features) and file.read_bytes() == whole
    stranger = tmp_path / f"{'0' * 64}.safetensors"
    file.rename(stranger)
    assert cache_module.read(stranger) is None  # its key is not its name


def test_without_a_cache_nothing_is_written(tmp_path: Path) -> None:
    images = LabelledImages(noise_images(12, 0), "x")
    found, sha256 = extract_cached(images, [tiny_net()], None, **OPTIONS)
    expected, other = extract_all(images, [tiny_net()])
    assert sha256 == other and torch.equal(found[0].features, expected[0].features)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be kept in .*; give --cache DIR or --no-cache"):
        extract_cached(images, [tiny_net()], tmp_path / "file" / "in", **OPTIONS)


def test_the_default_is_in_the_users_cache_and_none_without_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_module.default_directory() == tmp_path / ".cache" / "gspn-dit" / "statistics"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_module.default_directory() == tmp_path / "caches" / "gspn-dit" / "statistics"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_module.default_directory() is None

    def no_entry(path: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(no_entry))
    assert cache_module.default_directory() is None
