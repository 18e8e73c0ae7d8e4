"""Classes as users name them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from gspn_dit.errors import UserError, nearest


class ClassNames(list[str]):
    """Names by id. Unlike a plain list it belongs to a module, so that diffusers can register it as a component."""


def resolve_class(label: int | str, class_names: Sequence[str]) -> int:
    """Return the id of a class given as id, as digits, or by name; raises UserError for an unknown one.

    A name beats a number: among classes named "10", "20", … the label "10" is that name's class. Of a name with
    synonyms, such as "tench, Tinca tinca", one of them will do if no other class has it.
    """
    if isinstance(label, str) and label in class_names:
        return list(class_names).index(label)
    last = len(class_names) - 1
    if isinstance(label, str) and not label.removeprefix("-").isdecimal():
        owners = [number for number, name in enumerate(class_names) if label in name.split(", ")]
        if len(owners) == 1:
            return owners[0]
        if owners:
            raise UserError(f"class '{label}' is ambiguous: {', '.join(map(str, owners))} have that name; give the id")
        names = ", ".join(class_names[:20]) + (", …" if last >= 20 else "")
        raise UserError(f"unknown class '{label}'{nearest(label, class_names)}; classes are 0-{last}: {names}")
    if not isinstance(label, (Integral, str)):
        raise UserError(f"class {label!r} is neither an id nor a name; the model has classes 0-{last}")
    if not 0 <= int(label) <= last:
        raise UserError(f"class {label} is out of range; the model has classes 0-{last}")
    return int(label)
