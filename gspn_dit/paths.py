"""Paths that a person gives, in a config or on a command line."""

from __future__ import annotations

import argparse
import os
import re

from gspn_dit.errors import UserError

_VARIABLE = re.compile(r"\$\w|\$\{|\{\{")


def require_utf8(path: str | os.PathLike[str]) -> str:
    """Return a path as text; raises UserError, naming it, if its bytes are not UTF-8."""
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(text).decode("utf-8", "backslashreplace")
        raise UserError(f"the name {shown} is not UTF-8; rename it (convmv finds and renames such files)") from None
    return text


def user_path(text: str, name: str) -> str:
    """Return a path with `~` replaced by the home directory, which a shell does for some spellings only.

    Raises UserError, which calls it `name`, for a shell variable or a template, an unknown home directory, or
    characters that no path, or no report of it, can hold. What is not a path but the name of something passes through.

    >>> user_path("runs/a~b", "output_dir")
    'runs/a~b'
    """
    if _VARIABLE.search(text):
        raise UserError(
            f"{name} is {text}: variables and templates such as $HOME and {{{{ name }}}} are not replaced; "
            "write the path itself"
        )
    if "\0" in text:
        raise UserError(f"{name} is {text!r}, but no path can hold a NUL character")
    expanded = os.path.expanduser(require_utf8(text))
    if expanded.startswith("~"):
        raise UserError(
            f"{name} is {text}, but {text.split('/')[0]} is no home directory here; give the full path, or ./{text} "
            "for a file of that name"
        )
    return expanded


def path_argument(text: str) -> str:
    """`user_path` as the `type` of an argument of a command line, which adds the argument's name."""
    try:
        return user_path(text, "it")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def source_argument(text: str) -> str:
    """`path_argument` of the place in "KIND:PLACE"."""
    kind, colon, place = text.partition(":")
    return f"{kind}{colon}{path_argument(place)}"
