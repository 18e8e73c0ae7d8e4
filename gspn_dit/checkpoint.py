"""Checkpoints: directories that are complete or absent, made of safetensors and JSON, found by their step number.

    checkpoints/step-00000100/
        model.safetensors       weights
        ema.safetensors         moving average of the weights
        ema-0.050.safetensors   power-function average of this relative length, for each training.ema_sigma_rel
        optimizer.safetensors   optimiser state, "<parameter>.<state>"
        sharded/                instead of the optimiser's, in sharded training: its state in torch's distributed format
        config.json             the manifest, written last: format_version, step, config, model, latent, and bytes and
                                checksum of each file

A checkpoint is written beside its final place, every file and the directory are fsynced, then it is renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gspn_dit.errors import UserError, nearest
from gspn_dit.files import write_atomically

FORMAT_VERSION = 1
MANIFEST = "config.json"
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL_SUFFIX = ".partial"
BUILTIN = "builtin:"
"""What the name of a checkpoint that travels in the package begins with, as in "builtin:digits"."""
_BUILTIN_FOLDER = Path(__file__).parent / "builtin"


def checkpoint_directory(run_directory: str | os.PathLike[str], step: int) -> Path:
    """Return the directory of the checkpoint of a step."""
    return Path(run_directory) / "checkpoints" / f"step-{step:08d}"


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_complete(directory: Path) -> bool:
    """Tell whether a directory is a complete checkpoint."""
    return directory.is_dir() and _problem(directory) is None


def begin_checkpoint(target: Path) -> Path:
    """Make the empty directory in which a checkpoint grows, beside its place; remains of earlier ones are deleted."""
    for remains in (*target.parent.glob(f"step-*{_PARTIAL_SUFFIX}"), partial_directory(target)):
        shutil.rmtree(remains, ignore_errors=True)
    partial = partial_directory(target)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot save a checkpoint in {target.parent}: {error}") from error
    return partial


def partial_directory(target: Path) -> Path:
    """Return where a checkpoint grows before it is complete."""
    return target.with_name(target.name + _PARTIAL_SUFFIX)


def write_checkpoint(
    target: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], manifest: Mapping[str, Any]
) -> None:
    """Write a checkpoint atomically and durably; what was there is replaced.

    Args:
        target: its directory.
        step: optimiser steps done.
        tensors: named tensors of each file stem ("model", "ema", "optimizer").
        manifest: plain JSON values; step, format_version and what is known of the files are added.

    Raises:
        UserError: the disk refuses; what was there before is untouched.
    """
    finish_checkpoint(begin_checkpoint(target), target, step, tensors, manifest)


def finish_checkpoint(
    partial: Path, target: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], manifest: Mapping[str, Any]
) -> None:
    """Add tensors and manifest to what a growing checkpoint holds, and put it in its place."""
    try:
        files: dict[str, Any] = {
            str(path.relative_to(partial)): {"bytes": path.stat().st_size}  # its writer has its own format and checks
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        files |= {f"{stem}.safetensors": write_tensors(partial / f"{stem}.safetensors", named, _write_durably)
                  for stem, named in tensors.items()}  # fmt: skip
        _write_durably(partial / MANIFEST, _manifest_bytes({"step": step, **manifest}, files))
        for directory in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
            _sync_directory(directory)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
        _sync_directory(target.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot save the checkpoint of step {step} in {target.parent}: {error}") from error


def write_weights(directory: Path, tensors: Mapping[str, Mapping[str, Tensor]], manifest: Mapping[str, Any]) -> None:
    """Make a directory, which may hold other files, a checkpoint of weights; earlier weights are replaced.

    Each file is complete or as it was, the manifest comes last. Raises OSError.
    """
    files = {
        f"{stem}.safetensors": write_tensors(directory / f"{stem}.safetensors", named, write_atomically)
        for stem, named in tensors.items()
    }
    write_atomically(directory / MANIFEST, _manifest_bytes(manifest, files))


def write_tensors(
    path: Path,
    named: Mapping[str, Tensor],
    write: Callable[[Path, bytes], object],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Write a file of tensors through `write(path, content)`; return what a manifest says of it. Raises OSError."""
    from safetensors.torch import save

    content = save(
        {name: tensor.detach().contiguous().cpu() for name, tensor in named.items()}, dict(metadata or {}) or None
    )
    write(path, content)
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def _manifest_bytes(manifest: Mapping[str, Any], files: Mapping[str, Any]) -> bytes:
    complete = {"format_version": FORMAT_VERSION, **manifest, "files": files}
    return json.dumps(complete, indent=2, allow_nan=False).encode()


def _problem(directory: Path) -> str | None:
    """Return why a directory is not a complete checkpoint, or None."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return f"its {MANIFEST} is not a checkpoint's"
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        return f"it has format_version {version}, this version reads {FORMAT_VERSION}"
    for name, facts in manifest["files"].items():
        path = directory / name
        if not isinstance(facts, dict) or "bytes" not in facts:
            return f"its {MANIFEST} is not a checkpoint's: it does not say how large {name} is"
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"its file {name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
    return None


def find_checkpoints(run_directory: str | os.PathLike[str]) -> dict[int, Path]:
    """Return the complete checkpoints of a run by step, ascending; incomplete ones are ignored."""
    return {step: path for step, path in _all_checkpoints(run_directory).items() if _problem(path) is None}


def find_incomplete(run_directory: str | os.PathLike[str]) -> dict[int, str]:
    """Return what is wrong with each checkpoint of a run that is not complete, by step, ascending."""
    problems = {step: _problem(path) for step, path in _all_checkpoints(run_directory).items()}
    return {step: problem for step, problem in problems.items() if problem is not None}


def _all_checkpoints(run_directory: str | os.PathLike[str]) -> dict[int, Path]:
    folder = Path(run_directory) / "checkpoints"
    paths = list(folder.iterdir()) if folder.is_dir() else []
    matches = ((_NAME.fullmatch(path.name), path) for path in paths)
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def resolve_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return the checkpoint that is meant: one in a directory, the newest complete one of a run, or "builtin:NAME".

    Raises UserError where there is none, saying what is wrong.
    """
    path = _builtin_directory(os.fspath(path)) if is_builtin(path) else Path(path)
    if not path.is_dir():
        raise UserError(
            f"checkpoint {path} does not exist; give a run directory or one of its checkpoints/step-XXXXXXXX, "
            f"or {BUILTIN}digits"
        )
    if (path / "checkpoints").is_dir():
        complete = find_checkpoints(path)
        if complete:
            return complete[max(complete)]
        raise UserError(f"{path} has no complete checkpoint yet; train it with train.py --resume auto")
    problem = _problem(path)
    if problem is not None:
        raise UserError(f"{path} is not a complete checkpoint: {problem}")
    return path


def is_builtin(name: str | os.PathLike[str]) -> bool:
    """Tell whether a name is that of a checkpoint in the package, such as "builtin:digits"."""
    return os.fspath(name).startswith(BUILTIN)


def _builtin_directory(name: str) -> Path:
    known = sorted(path.parent.name for path in _BUILTIN_FOLDER.glob(f"*/{MANIFEST}"))
    word = name.removeprefix(BUILTIN)
    if word not in known:
        allowed = ", ".join(f"{BUILTIN}{each}" for each in known)
        raise UserError(f"there is no checkpoint {name} in the package{nearest(word, known)}; there is {allowed}")
    return _BUILTIN_FOLDER / word


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a complete checkpoint."""
    return json.loads((directory / MANIFEST).read_bytes())


def load_tensors(directory: Path, stem: str) -> dict[str, Tensor]:
    """Read one file of a complete checkpoint; nothing is unpickled. Raises UserError if it is damaged, or not of it."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = directory / f"{stem}.safetensors"
    try:
        content = path.read_bytes()
        facts = read_manifest(directory)["files"].get(path.name, {})
        if "crc32" not in facts:
            raise UserError(f"{path} is not of this checkpoint, whose {MANIFEST} does not list it with a checksum")
        if zlib.crc32(content) != facts["crc32"]:
            raise UserError(f"{path} is damaged (checksum); move {directory} away to go on from an earlier one")
        return load(content)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def load_weights(model: nn.Module, directory: Path, stem: str) -> None:
    """Give a model the weights in one file of a complete checkpoint; raises UserError where they are another's."""
    give_weights(model, load_tensors(directory, stem), directory, stem)


def give_weights(model: nn.Module, tensors: Mapping[str, Tensor], directory: Path, stem: str) -> None:
    """Give a model tensors that come from a file of a checkpoint; raises UserError where they are another model's."""
    expected = model.state_dict()
    for name in sorted({*tensors, *expected}):
        if name not in tensors or name not in expected:
            where = "is not in" if name not in tensors else "is only in"
            raise UserError(f"{directory} belongs to another model: tensor '{name}' {where} its {stem}.safetensors")
        if tensors[name].shape != expected[name].shape:
            raise UserError(
                f"{directory} belongs to another model: '{name}' has shape {list(tensors[name].shape)}, "
                f"its config.json asks for {list(expected[name].shape)}"
            )
    model.load_state_dict(tensors)


def remove_old_checkpoints(
    run_directory: str | os.PathLike[str], keep_last: int, keep_every: int | None, needed: Collection[int] = ()
) -> None:
    """Delete all complete checkpoints but the newest `keep_last`, multiples of `keep_every` steps, and needed ones."""
    complete = find_checkpoints(run_directory)
    for step in list(complete)[:-keep_last]:
        if (keep_every is None or step % keep_every) and step not in needed:
            shutil.rmtree(complete[step])
