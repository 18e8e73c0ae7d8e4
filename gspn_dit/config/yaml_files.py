"""YAML as a config needs it: plain values, unique keys, words as written, errors with file, line and key."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from gspn_dit.errors import UserError

MAX_VALUES = 10_000
"""Values a file may hold, aliases counted as often as they are used: a few lines of them can stand for billions."""
MAX_DEPTH = 10
"""Lists and mappings inside one another; a config needs three."""
_TAG = "tag:yaml.org,2002:"
_TEXTS = (f"{_TAG}str", f"{_TAG}timestamp")  # a date is no value of any key
_PLAIN = tuple(f"{_TAG}{name}" for name in ("null", "bool", "int", "float"))
_MERGE = f"{_TAG}merge"
_SURPRISES = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Numbers that YAML 1.1 reads in base 8 or 60."""


def read_mapping(path: str | os.PathLike[str], is_text: Callable[[str], bool]) -> dict[str, Any]:
    """Read a file of keys and values, UTF-8 with or without a byte order mark.

    Args:
        path: the file.
        is_text: tells of a "section.key" whether its value is text: then `no`, `007` and `2024-05-01` are words.

    Raises:
        UserError: the file cannot be read, is not YAML, or holds something that is neither text, number, truth value,
            null, list nor mapping; a key is given twice; a number is not finite, or not what it seems.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except RecursionError:
        raise UserError(f"config file {path} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    if node is None:
        return {}
    try:
        tree = _Reader(loader, is_text).value(node, "")
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config file {path} must hold keys and values, not a {type(tree).__name__}")
    return tree


class _Reader:
    """Turns the nodes of a file into values; raises YAMLError with line and key."""

    def __init__(self, loader: yaml.SafeLoader, is_text: Callable[[str], bool]) -> None:
        self.loader, self.is_text = loader, is_text
        self.values = 0
        self.around: list[yaml.Node] = []
        """The lists and mappings that the present node lies in."""

    def value(self, node: yaml.Node, key: str) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            self._refuse(node, key, f"the file stands for more than {MAX_VALUES:,} values")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, key)
        if any(node is outer for outer in self.around):
            self._refuse(node, key, "the alias stands for something that contains it")
        if len(self.around) == MAX_DEPTH:
            self._refuse(node, key, f"lists and mappings lie more than {MAX_DEPTH} deep in one another")
        self.around.append(node)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            result: Any = self._mapping(node, key)
        elif isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            result = [self.value(item, key) for item in node.value]
        else:
            self._refuse(node, key, f"{_short(node.tag)} is not a value that a config can hold")
        self.around.pop()
        return result

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, key, "a key is a word; {{ … }} is a template that has not been filled in")
            self._check_text(key_node, key)
            name = key_node.value
            if key_node.tag == _MERGE:
                sources = self.value(value_node, key)
                for source in sources if isinstance(sources, list) else [sources]:
                    if not isinstance(source, dict):
                        self._refuse(value_node, key, "<< takes a mapping")
                    merged = {**source, **merged}
                continue
            if name in found:
                raise yaml.YAMLError(f"key '{name}' is given twice (line {key_node.start_mark.line + 1})")
            found[name] = self.value(value_node, f"{key}.{name}".removeprefix("."))
        return {**merged, **found}

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        plain = node.style is None
        self._check_text(node, key)
        if node.tag in _TEXTS or (plain and self.is_text(key) and node.tag in _PLAIN[1:]):
            return node.value
        if node.tag not in _PLAIN:
            self._refuse(node, key, f"{_short(node.tag)} is not a value that a config can hold")
        try:
            value = self.loader.construct_object(node)
        except (ValueError, OverflowError) as error:
            self._refuse(node, key, str(error))
        if isinstance(value, float) and not math.isfinite(value):
            self._refuse(node, key, f"{node.value} is not finite")
        if isinstance(value, (int, float)) and _SURPRISES.fullmatch(node.value):
            self._refuse(node, key, f"{node.value} would be read as {value}; write the number without 0 in front or :")
        return value

    def _check_text(self, node: yaml.ScalarNode, key: str) -> None:
        if re.search("[\ud800-\udfff]", node.value):
            self._refuse(node, key, f"{node.value!r} is not text that UTF-8 can hold")

    def _refuse(self, node: yaml.Node, key: str, problem: str) -> Any:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}{f', key {key}' if key else ''}: {problem}")


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")
