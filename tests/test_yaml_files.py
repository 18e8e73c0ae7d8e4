"""YAML's surprises: what a config file's values mean, and that nonsense is refused by file, line and key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gspn_dit.config import flatten, load_config, parse_train_arguments
from gspn_dit.config.parsing import PATHS, _types
from gspn_dit.config.yaml_files import read_mapping
from gspn_dit.errors import UserError


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], str]:
    """Write a config file and return its path."""

    def to_file(text: str | bytes) -> str:
        path = tmp_path / "some.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return to_file


def value_of(file: str, key: str) -> Any:
    return dict(flatten(load_config(file).to_dict()))[key]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("output_dir: 2024-05-01", "output_dir", "2024-05-01"),
        ("data: {path: 2024-05-01T10:00:00, name: imagefolder}", "data.path", "2024-05-01T10:00:00"),
        ("output_dir: 123", "output_dir", "123"),
        ("output_dir: on", "output_dir", "on"),
        ("data: {path: 007, name: imagefolder}", "data.path", "007"),
        ("data: {path: no, name: imagefolder}", "data.path", "no"),
        ("data: {path: 1e5, name: imagefolder}", "data.path", "1e5"),
        ("training: {mixed_precision: no}", "training.mixed_precision", "no"),
        ("sampling: {sampler: null}", "sampling.sampler", None),
        ("training: {max_grad_norm: null}", "training.max_grad_norm", None),
        ("training: {max_grad_norm: ~}", "training.max_grad_norm", None),
        ("training: {batch_size: 1_024}", "training.batch_size", 1024),
        ("seed: 0", "seed", 0),
        ("training:\n  <<: {batch_size: 8, log_every: 3}\n  batch_size: 16", "training.batch_size", 16),
        ("training:\n  <<: {batch_size: 8, log_every: 3}\n  batch_size: 16", "training.log_every", 3),
        ("training: {adam_betas: &b [0.1, 0.5]}\nsampling: {guidance_interval: *b}", "training.adam_betas", [0.1, 0.5]),
        ('output_dir: "日本\U0001f600\\u2028x"', "output_dir", "日本\U0001f600\u2028x"),
        (b"\xef\xbb\xbfseed: 3\r\n", "seed", 3),
    ],
)  # fmt: skip
def test_values(write: Callable[[str | bytes], str], text: str | bytes, key: str, value: Any) -> None:
    found = value_of(write(text), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("output_dir: {{ out }}", "line 1, key output_dir: a key is a word; {{ … }} is a template"),
        ("seed: 1\n? [a, b]\n: 1", "line 2: a key is a word"),
        ("a: &a [*a]", "line 1, key a: the alias stands for something that contains it"),
        ("output_dir: &a {x: *a}", "line 1, key output_dir.x: the alias"),
        ("training: &a {<<: *a}", "line 1, key training: the alias"),
        ("training: {<<: 3}", "line 1, key training: << takes a mapping"),
        ("seed: 010", "line 1, key seed: 010 would be read as 8"),
        ("training:\n  max_steps: 1:30", "line 2, key training.max_steps: 1:30 would be read as 90"),
        ("training: {learning_rate: .inf}", "key training.learning_rate: .inf is not finite"),
        ("training: {adam_betas: [0.9, .nan]}", "key training.adam_betas: .nan is not finite"),
        ("output_dir: !!binary aGk=", "key output_dir: !!binary is not a value that a config can hold"),
        ("training: {trackers: !!set {a}}", "key training.trackers: !!set is not a value"),
        ("model: {name: !!python/object/apply:os.system [ls]}", "key model.name: !!python/object/apply:os.system"),
        ("seed: 1\nseed: 2", "key 'seed' is given twice (line 2)"),
        ("seed: " + "9" * 5000, "key seed: Exceeds the limit"),
        (b"output_dir: r\xe9", "'utf-8' codec can't decode byte 0xe9"),
        ("a: [[[[[[[[[[[1]]]]]]]]]]]", "key a: lists and mappings lie more than 10 deep"),
        ("a: " + "[" * 5000, ""),
        ('model: {name: "a\\ud800b"}', "key model.name: 'a\\ud800b' is not text that UTF-8 can hold"),
        ('training: {"\\ud800": 1}', "key training: '\\ud800' is not text that UTF-8 can hold"),
        ("seed: 1\n---\nseed: 2", "expected a single document"),
    ],
)
def test_refusals_name_file_line_and_key(write: Callable[[str | bytes], str], text: str | bytes, problem: str) -> None:
    file = write(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"config file {file} cannot be read: ")
    assert problem in str(caught.value)


def test_a_few_lines_of_aliases_cannot_fill_the_memory(write: Callable[[str | bytes], str]) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(UserError, match="the file stands for more than 10,000 values"):
        read_mapping(write("\n".join(lines)), lambda key: False)


@pytest.mark.parametrize("text", ["", "# nothing\n", "--- {}\n"])
def test_training_by_an_empty_file_is_refused(write: Callable[[str | bytes], str], text: str) -> None:
    with pytest.raises(UserError, match=r"some\.yaml holds no keys; fill it, or leave --config out"):
        parse_train_arguments(["--config", write(text)])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("training:\n  max_steps: many", 'config key "training.max_steps":'),
        ("training: {max_steps: 0}", "training.max_steps is 0, but must be at least 1"),
        ("seed: -1", "seed is -1, but must lie in"),
        ('output_dir: "a\\0b"', "output_dir is 'a\\x00b', but must be text without control characters, in UTF-8"),
        ('model: {name: "a\\x07b"}', "model.name is 'a\\x07b', but must be text without"),
        ("output_dir: $HOME/runs", "output_dir is $HOME/runs: variables and templates such as $HOME"),
        ("data: {path: '{{ x }}/a'}", "data.path is {{ x }}/a: variables and templates"),
    ],
)
def test_values_of_a_file_are_refused_with_its_name(
    write: Callable[[str | bytes], str], text: str, problem: str
) -> None:
    file = write(text)
    with pytest.raises(UserError) as caught:
        parse_train_arguments(["--config", file])
    assert str(caught.value).startswith(f"{file}: {problem}")


def test_what_the_command_line_says_is_not_blamed_on_the_file(write: Callable[[str | bytes], str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_train_arguments(["--config", write("seed: 1"), "--seed", "-1"])
    assert str(caught.value).startswith("seed is -1")


@pytest.mark.parametrize("key", ["max_grad_norm", "learning_rate", "weight_decay", "ema_decay", "repa_weight"])
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_numbers_on_the_command_line_are_finite(key: str, value: str) -> None:
    with pytest.raises(UserError, match=f"training.{key} is -?(inf|nan), but must be finite"):
        parse_train_arguments([f"--training.{key}={value}"])


def test_home_is_replaced_in_every_path(write: Callable[[str | bytes], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    file = write(
        "output_dir: ~/runs/x\ndata: {name: latents, path: ~/data}\nlatent: {vae: ~/vae}\n"
        "training: {initialize_from: ~/runs/y, repa_features: ~/f.npy, fd_features: ~/net}\n"
        "task: text-to-image\ntext: {encoder: ~/bert, table: ~/texts}\nunet: {teacher: ~/runs/unet}\n"
    )
    values = dict(flatten(load_config(file).to_dict()))
    assert {key: values[key] for key in PATHS} == {
        "output_dir": "/home/ada/runs/x",
        "data.path": "/home/ada/data",
        "latent.vae": "/home/ada/vae",
        "training.initialize_from": "/home/ada/runs/y",
        "training.repa_features": "/home/ada/f.npy",
        "training.fd_features": "/home/ada/net",
        "text.encoder": "/home/ada/bert",
        "text.table": "/home/ada/texts",
        "unet.teacher": "/home/ada/runs/unet",
    }
    parsed = parse_train_arguments(["--config=" + file, "--resume=~/runs/x", "--output_dir=~/z"])
    assert (parsed.resume, parsed.config.output_dir) == ("/home/ada/runs/x", "/home/ada/z")


def test_every_free_text_is_a_path_or_known_to_be_none() -> None:
    """A new key whose value is text must be sorted into `PATHS`, or here."""
    names = {"task", "objective.name", "sampling.sampler", "model.name", "model.mixer", "data.name"}
    names |= {"data.caption_column"}
    assert {key for key, kinds in _types().items() if str in kinds} == {*PATHS, *names}
