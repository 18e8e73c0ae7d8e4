"""From a YAML file and a command line to a `Config`, and back.

A key that does not exist, is misspelt or abbreviated, or has a value of another type is refused by name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from gspn_dit.config.schema import Config, TrainArguments
from gspn_dit.config.yaml_files import read_mapping
from gspn_dit.errors import UserError, command_name, nearest
from gspn_dit.paths import user_path

PATHS = (
    *("output_dir", "data.path", "latent.vae"),
    *("training.initialize_from", "training.repa_features", "training.fd_features"),
    *("text.encoder", "text.table", "unet.teacher"),
)
"""Keys whose value is a path, or can be one."""

MAPPINGS = ("model.mixer_options.", "model.backbone_options.")
"""What begins the keys that are not known here."""


@functools.cache
def _types() -> dict[str, tuple[Any, ...]]:
    """Return the types that each key takes, by "section.key"."""

    def of(section: Any, prefix: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
        for name, kind in get_type_hints(section).items():
            if dataclasses.is_dataclass(kind):
                yield from of(kind, f"{name}.")
            else:
                yield f"{prefix}{name}", get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)

    return dict(of(Config, ""))


@functools.cache
def _text_keys() -> frozenset[str]:
    """Return the keys whose value is a word, one of several words, or a list of words."""
    return frozenset(
        key
        for key, kinds in _types().items()
        if all(kind in (str, list[str], NoneType) or get_origin(kind) is Literal for kind in kinds)
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("section.key", value) for every leaf of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_keys(keys: Sequence[str], source: str, also: Sequence[str] = ()) -> None:
    sections = {key.split(".")[0] for key in _types() if "." in key}
    for key in keys:
        if key in sections:
            raise UserError(f"{source}: '{key}' is a section; give its keys as {key}.KEY")
        if key not in _types() and not key.startswith(MAPPINGS):
            last_words = [known.split(".")[-1] for known in _types()]
            hint = nearest(key, [*_types(), *also]) or nearest(key.split(".")[-1], last_words)
            raise UserError(f"{source}: unknown key '{key}'{hint}")


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a config file into a nested dict whose keys are known; raises UserError with the file's name."""
    tree = read_mapping(path, _text_keys().__contains__)
    _check_keys([key for key, _ in flatten(tree)], str(path))
    return tree


@functools.cache
def _build_parser(program: str) -> Any:
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=program,
        description="Train a diffusion model; every key of the config can be given as --section.key.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_argument(
        "--resume",
        type=str | None,
        help="'auto' continues output_dir from its newest complete checkpoint, or starts it; DIR: a checkpoint",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete what output_dir holds and start afresh")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, FLOPs, memory, steps, data and what would be written, and stop",
    )
    parser.add_class_arguments(Config, None, as_group=False)
    return parser


def _parse(arguments: list[str], tree: Mapping[str, Any], program: str) -> TrainArguments:
    import argparse

    parser = _build_parser(program)
    try:
        parsed = parser.parse_args(["--config", _as_yaml(tree), *arguments])
        _check_nulls(parsed)
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        built = instantiate(parsed)
        config = Config(**{spec.name: built[spec.name] for spec in dataclasses.fields(Config)})
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(str(error).replace("Parser key ", "config key ")) from None
    return TrainArguments(config, parsed.resume, parsed.overwrite, parsed.dry_run)


def _as_yaml(tree: Mapping[str, Any]) -> str:
    """Return JSON that is YAML: its letters beyond ASCII are escaped one by one, not as pairs of surrogates."""
    text = json.dumps(tree, ensure_ascii=False)
    return re.sub(r"[^\x20-\x7e]", lambda letter: f"\\U{ord(letter[0]):08x}", text)


def _check_nulls(parsed: Mapping[str, Any]) -> None:
    """Refuse null, which the parser takes for any key, where it is no value of the key."""
    defaults = dict(flatten(dataclasses.asdict(Config())))
    for key, kinds in _types().items():
        if parsed[key] is None and NoneType not in kinds:
            raise UserError(f"config key {key} is null, but needs a value; leave the key out for {defaults[key]!r}")


def parse_train_arguments(arguments: Sequence[str] | None = None) -> TrainArguments:
    """Parse `--config FILE --section.key value … --resume auto|DIR --overwrite --dry-run`; the command line beats
    the file.

    Raises UserError for an unknown, abbreviated or ill-typed key, or a value out of range.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    program = command_name()
    if "-h" in given or "--help" in given:
        _build_parser(program).print_help()
        sys.exit(0)
    rest, files = [], []
    tokens = iter(given)
    for token in tokens:
        if token == "--config":
            files.append(next(tokens, ""))
        elif token.startswith("--config="):
            files.append(token.partition("=")[2])
        else:
            rest.append(token)
    if "" in files:
        raise UserError("--config needs a file")
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times; give one file")
    options = [token[2:].split("=")[0] for token in rest if token.startswith("--")]
    flags = ("config", "resume", "overwrite", "dry-run")
    _check_keys([key for key in options if key not in flags], "command line", flags)
    if not files:
        return _with_places(_parse(rest, {}, program))
    file = user_path(files[0], "--config")
    tree = read_yaml(file)
    if not tree:
        raise UserError(f"config file {file} holds no keys; fill it, or leave --config out to train by the defaults")
    try:
        return _with_places(_parse(rest, tree, program))
    except UserError as error:
        named = re.match(r'(?:config key "?)?([\w.]+)', str(error))
        of_file = named is not None and named[1] in dict(flatten(tree)).keys() - set(options)
        raise UserError(f"{file}: {error}" if of_file else str(error)) from None


def _with_places(parsed: TrainArguments) -> TrainArguments:
    """Replace `~` in every path; raises UserError for what is no path."""
    resume = parsed.resume and user_path(parsed.resume, "--resume")
    return dataclasses.replace(parsed, config=_with_paths(parsed.config), resume=resume)


def _with_paths(config: Config) -> Config:
    changes: dict[str, Any] = {}
    for key in PATHS:
        section, _, name = key.rpartition(".")
        part = changes.get(section, getattr(config, section)) if section else config
        if given := getattr(part, name):
            place = user_path(given, key)
            changes |= {section: dataclasses.replace(part, **{name: place})} if section else {name: place}
    return dataclasses.replace(config, **changes)


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read a YAML file into a `Config`; keys it does not name keep their defaults."""
    return _with_paths(_parse([], read_yaml(path), "config").config)


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """Build a `Config` from the dict that `Config.to_dict` gave (a checkpoint's)."""
    return _parse([], tree, "config").config


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write the resolved config as YAML that `load_config` reads back equal."""
    Path(path).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
