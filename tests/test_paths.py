"""Paths that a person gives: the home directory is meant by `~`, variables are refused, all else stays."""

from __future__ import annotations

import os

import pytest

from gspn_dit.errors import ArgumentParser, UserError
from gspn_dit.paths import path_argument, user_path


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~", "/home/ada"),
        ("~/runs/x", "/home/ada/runs/x"),
        ("runs/~x", "runs/~x"),
        ("./~x", "./~x"),
        ("é: ü", "é: ü"),
        ("prices in $", "prices in $"),
        ("owner/name", "owner/name"),
    ],
)
def test_what_is_meant(given: str, meant: str) -> None:
    assert user_path(given, "--out") == meant


@pytest.mark.parametrize("given", ["$HOME/x", "${HOME}/x", "a/$x", "runs/{{ out }}"])
def test_variables_are_refused(given: str) -> None:
    with pytest.raises(UserError) as caught:
        user_path(given, "output_dir")
    assert str(caught.value) == (
        f"output_dir is {given}: variables and templates such as $HOME and {{{{ name }}}} are not replaced; "
        "write the path itself"
    )


def test_an_unknown_home_is_refused() -> None:
    with pytest.raises(UserError, match=r"--out is ~no-such-user/x, but ~no-such-user is no home directory here"):
        user_path("~no-such-user/x", "--out")


def test_no_path_holds_nul() -> None:
    with pytest.raises(UserError, match="but no path can hold a NUL character"):
        user_path("a\0b", "--out")


def test_a_path_that_is_not_utf8_is_refused() -> None:
    """Configs, manifests and reports could not hold it."""
    with pytest.raises(UserError, match=r"the name runs/caf\\xe9 is not UTF-8; rename it") as caught:
        user_path(os.fsdecode(b"runs/caf\xe9"), "--out")
    str(caught.value).encode()


def test_a_command_line_names_the_argument() -> None:
    parser = ArgumentParser(prog="some")
    parser.add_argument("--out", type=path_argument)
    assert parser.parse_args(["--out", "~/a"]).out == "/home/ada/a"
    with pytest.raises(UserError, match=r"argument --out: it is \$HOME/x: variables"):
        parser.parse_args(["--out", "$HOME/x"])
