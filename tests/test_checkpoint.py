"""Checkpoints are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gspn_dit import checkpoint as module
from gspn_dit.checkpoint import (
    begin_checkpoint,
    checkpoint_directory,
    find_checkpoints,
    finish_checkpoint,
    load_tensors,
    read_manifest,
    remove_old_checkpoints,
    resolve_checkpoint,
    write_checkpoint,
)
from gspn_dit.errors import UserError


def save(run: Path, step: int, value: float = 1.0) -> Path:
    tensors = {"model": {"w": torch.full((3,), value)}, "ema": {"w": torch.full((3,), value / 2)}}
    write_checkpoint(checkpoint_directory(run, step), step, tensors, {"note": "x"})
    return checkpoint_directory(run, step)


def record_calls(monkeypatch: pytest.MonkeyPatch, before: Callable[[str, int], None]) -> list[str]:
    """Record open, write, fsync and rename as the module calls them; `before(name, count)` may raise."""
    calls: list[str] = []
    paths: dict[int, str] = {}
    original_open, original_fsync, original_rename = open, os.fsync, os.rename

    def note(kind: str, path: Any) -> None:
        before(kind, len(calls))
        calls.append(f"{kind} {Path(path).name}")

    class Recorded:
        def __init__(self, path: Path, mode: str) -> None:
            note("open", path)
            self.path, self.file = path, original_open(path, mode)
            paths[self.file.fileno()] = str(path)

        def __enter__(self) -> Recorded:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            note("write", self.path)
            self.file.write(content[len(content) // 2 :])

        def flush(self) -> None:
            self.file.flush()

        def fileno(self) -> int:
            return self.file.fileno()

    def fsync(descriptor: int) -> None:
        note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        original_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        note("rename", target)
        original_rename(source, target)

    monkeypatch.setattr(module, "open", Recorded, raising=False)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    return calls


def test_round_trip(tmp_path: Path) -> None:
    directory = save(tmp_path, 12)
    assert directory == tmp_path / "checkpoints" / "step-00000012"
    assert find_checkpoints(tmp_path) == {12: directory}
    manifest = read_manifest(directory)
    assert (manifest["format_version"], manifest["step"], manifest["note"]) == (1, 12, "x")
    assert manifest["files"] == {
        name: {"bytes": (directory / name).stat().st_size, "crc32": zlib.crc32((directory / name).read_bytes())}
        for name in ("model.safetensors", "ema.safetensors")
    }
    assert torch.equal(load_tensors(directory, "ema")["w"], torch.full((3,), 0.5))


def test_every_file_is_synced_before_the_directory_and_that_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_calls(monkeypatch, lambda kind, count: None)
    save(tmp_path, 5)
    files = ["model.safetensors", "ema.safetensors", "config.json"]
    expected = [f"{kind} {name}" for name in files for kind in ("open", "write", "fsync")]
    assert calls == [*expected, "fsync step-00000005.partial", "rename step-00000005", "fsync checkpoints"]


def test_a_directory_that_others_filled_is_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = checkpoint_directory(tmp_path, 5)
    partial = begin_checkpoint(target)
    (partial / "sharded").mkdir()
    (partial / "sharded" / "__0_0.distcp").write_bytes(b"shard")
    calls = record_calls(monkeypatch, lambda kind, count: None)
    finish_checkpoint(partial, target, 5, {}, {})
    assert calls[-4:-1] == ["fsync sharded", "fsync step-00000005.partial", "rename step-00000005"]
    assert read_manifest(target)["files"] == {"sharded/__0_0.distcp": {"bytes": 5}}


@pytest.mark.parametrize("failing", range(12))
def test_death_or_full_disk_at_any_call_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """11 calls write a checkpoint and one makes the rename durable; after that rename the new one counts."""

    class Killed(BaseException):
        pass

    for error in (Killed(), OSError(errno.ENOSPC, "No space left on device")):
        run = tmp_path / type(error).__name__
        save(run, 1)
        with monkeypatch.context() as patch:

            def fail(kind: str, count: int, error: BaseException = error) -> None:
                if count == failing:
                    raise error

            record_calls(patch, fail)
            with pytest.raises((Killed, UserError)) as caught:
                save(run, 2)
        if isinstance(error, OSError):
            assert "cannot save the checkpoint of step 2" in str(caught.value)
            assert "No space left on device" in str(caught.value)
        renamed = failing == 11
        assert list(find_checkpoints(run)) == ([1, 2] if renamed else [1])
        assert torch.equal(load_tensors(resolve_checkpoint(run), "model")["w"], torch.ones(3))
        save(run, 2)
        assert list(find_checkpoints(run)) == [1, 2]
        assert not list(run.glob("checkpoints/*.partial"))


def truncate_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def remove_weights(directory: Path) -> None:
    (directory / "ema.safetensors").unlink()


def cut_manifest(directory: Path) -> None:
    (directory / "config.json").write_text('{"format_version": 1, "fil')


def remove_manifest(directory: Path) -> None:
    (directory / "config.json").unlink()


def strip_sizes(directory: Path) -> None:
    manifest = json.loads((directory / "config.json").read_text())
    manifest["files"] = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    (directory / "config.json").write_text(json.dumps(manifest))


def later_format(directory: Path) -> None:
    manifest = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**manifest, "format_version": 2}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncate_weights, r"its file model\.safetensors has \d+ bytes instead of \d+"),
        (remove_weights, r"its file ema\.safetensors is missing"),
        (cut_manifest, r"its config\.json cannot be read"),
        (remove_manifest, r"it has no config\.json"),
        (strip_sizes, r"its config\.json is not a checkpoint's: it does not say how large \w+\.safetensors is"),
        (later_format, r"it has format_version 2, this version reads 1"),
    ],
)
def test_damaged_checkpoint_is_ignored_in_a_run_and_named_when_asked_for(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    damage(newest)
    assert list(find_checkpoints(tmp_path)) == [1]
    assert resolve_checkpoint(tmp_path).name == "step-00000001"
    with pytest.raises(UserError, match=f"step-00000002 is not a complete checkpoint: {message}"):
        resolve_checkpoint(newest)


def test_flipped_bit_is_noticed_when_the_file_is_read(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged .* move .* away to go on from an earlier one"):
        load_tensors(directory, "model")


def test_file_that_the_manifest_does_not_list_is_not_read(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    shutil.copy(directory / "ema.safetensors", directory / "ema-0.100.safetensors")
    with pytest.raises(UserError, match=r"ema-0\.100\.safetensors is not of this checkpoint, whose config\.json"):
        load_tensors(directory, "ema-0.100")
    with pytest.raises(UserError, match=r"repa\.safetensors cannot be read"):
        load_tensors(directory, "repa")


def test_writing_a_step_again_replaces_its_checkpoint_and_clears_remains(tmp_path: Path) -> None:
    directory = save(tmp_path, 3, value=1.0)
    (tmp_path / "checkpoints" / "step-00000002.partial").mkdir()
    assert save(tmp_path, 3, value=2.0) == directory
    assert torch.equal(load_tensors(directory, "model")["w"], torch.full((3,), 2.0))
    save(tmp_path, 4)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000003", "step-00000004"]


def test_newest_is_found_by_number_not_by_time_or_size(tmp_path: Path) -> None:
    for step in (100_000_000, 9, 20):
        save(tmp_path, step)
    assert list(find_checkpoints(tmp_path)) == [9, 20, 100_000_000]
    assert resolve_checkpoint(tmp_path).name == "step-100000000"


def test_missing_checkpoint_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; give a run directory or one of its checkpoints"):
        resolve_checkpoint(tmp_path / "absent")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no complete checkpoint yet"):
        resolve_checkpoint(tmp_path)


def test_retention_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    for step in (10, 20, 25, 30, 35):
        save(tmp_path, step)
    remove_old_checkpoints(tmp_path, keep_last=2, keep_every=20)
    assert list(find_checkpoints(tmp_path)) == [20, 30, 35]
    remove_old_checkpoints(tmp_path, keep_last=1, keep_every=None)
    assert list(find_checkpoints(tmp_path)) == [35]
