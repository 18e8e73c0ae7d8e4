"""Who takes part in a study of quality: rivals and scans in two blocks, the options each may search, equal parameters.

Every contender has options of its own from which its search draws as many settings as any other's; the first value of
each option is the default. All have as many parameters as the reference: DiT's block and the U-shaped one fill up by
the width of their MLPs, the published block, which has none, by its own width.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.scoring import DataSet
from gspn_dit.errors import UserError
from gspn_dit.models.presets import GSPN2_BLOCK

REFERENCE = "attention"
"""Whose parameters all others have."""
TOLERANCE = 0.02
"""By which parameters may differ from the reference's."""

Setting = tuple[tuple[str, Any], ...]
"""Options by name, as a value that can be a key."""


@dataclass(frozen=True)
class Contender:
    """A model: what is fixed of it, and what its search may choose."""

    family: str
    base: Mapping[str, Any]
    options: Mapping[str, Sequence[Any]]
    ours: bool = False
    fit: str = "mlp_ratio"
    """The option that makes parameters equal."""

    def settings(self, count: int) -> list[Setting]:
        """Return that many different settings, the defaults first, the others drawn once and for all.

        Raises UserError if there are not so many.
        """
        every = [tuple(zip(self.options, values, strict=True)) for values in itertools.product(*self.options.values())]
        if count > len(every):
            raise UserError(f"--trials is {count}, but a contender has {len(every)} settings; give fewer")
        return [every[0], *random.Random(0).sample(every[1:], count - 1)]


_FLAG, _UNSET = (False, True), (True, False)
_MLP = {"norm": ("layer", "rms"), "mlp": ("gelu", "swiglu")}
_TUNED = {"norm": ("layer", "rms"), "mlp": ("swiglu", "gelu")}
"""Of rivals with the parts that `benchmarks.block` found best for them."""
_HEADS = {"num_heads": (2, 4)}
"""At size N; at others so many times as the published models have more."""
NARROWER = "5/6 of the preset"
"""Width of a U-shaped block, to make room for the MLP, which the published one has not."""
_U_SHAPED = {"hidden_size": NARROWER, "gate_norm": True}
_U_OPTIONS = {"positions": _FLAG, "lpu": _FLAG, "long_skips": _UNSET, "norm": ("layer", "rms")}
_GATES = {"gate_scale": (1.0, 0.5, 2.0)}
_GSPN2_OPTIONS = {"weight_groups": (4, 16, 1), "gate_scale": (0.5, 1.0, 2.0), "norm": ("layer", "rms")}
_NORMED = {"scan_norm": "layer", "channel_skip": True}
_ATTENTION = {**_TUNED, **_HEADS, "rotary": _FLAG}
_MIXED = {"lpu": True, "conv_every": GSPN2_BLOCK["conv_every"]}
"""Of rivals with as many convolutions in place of their own mixer as GSPN2 has."""

CONTENDERS: dict[str, Contender] = {
    # In DiT's block.
    "attention": Contender("DiT", {"mixer": "attention", "positions": True}, {**_MLP, **_HEADS, "rotary": _FLAG}),
    "attention-lpu": Contender(
        "DiT", {"mixer": "attention", "positions": True, "lpu": True}, {**_MLP, **_HEADS, "rotary": _FLAG}
    ),
    "attention-interpolated": Contender(
        "DiT",
        {"mixer": "attention", "positions": True, "interpolate_positions": True, "lpu": True},
        _ATTENTION,
    ),
    "attention-tuned": Contender("DiT", {"mixer": "attention", "positions": True, "lpu": True}, _ATTENTION),
    "attention-mixed": Contender("DiT", {"mixer": "attention", "positions": True, **_MIXED}, _ATTENTION),
    "conv": Contender("DiT", {"mixer": "conv"}, {**_MLP, "positions": _UNSET, "lpu": _FLAG}),
    "conv-tuned": Contender("DiT", {"mixer": "conv"}, {**_TUNED, "positions": _UNSET, "lpu": _FLAG}),
    "linear": Contender("DiT", {"mixer": "linear"}, {**_MLP, **_HEADS, "positions": _UNSET}),
    "linear-tuned": Contender("DiT", {"mixer": "linear", "lpu": True}, {**_TUNED, **_HEADS, "positions": _UNSET}),
    "linear-mixed": Contender("DiT", {"mixer": "linear", **_MIXED}, {**_TUNED, **_HEADS, "positions": _UNSET}),
    "neighbourhood": Contender(
        "DiT", {"mixer": "neighbourhood", "positions": True}, {**_MLP, **_HEADS, "neighbourhood": (7, 5, 3)}
    ),
    "gspn-plain": Contender(
        "DiT",
        {"mixer": "gspn", "positions": True},
        {"weight_groups": (4, None, 1), **_GATES, "norm": ("layer", "rms")},
        ours=True,
    ),
    "gspn": Contender(
        "DiT",
        {"mixer": "gspn", "lpu": True},
        {"weight_groups": (4, None, 1), **_GATES, "positions": _FLAG, "norm": ("layer", "rms")},
        ours=True,
    ),
    "gspn-normed": Contender(
        "DiT",
        {"mixer": "gspn", "lpu": True, **_NORMED},
        {"weight_groups": (4, None, 1), **_GATES, "positions": _FLAG, "norm": ("layer", "rms")},
        ours=True,
    ),
    "gspn2": Contender("GSPN2", GSPN2_BLOCK, _GSPN2_OPTIONS, ours=True),
    "gspn2-free": Contender("GSPN2", {**GSPN2_BLOCK, "positions": False}, _GSPN2_OPTIONS, ours=True),
    # With what `benchmarks.block` found best for each with 1,024 tokens.
    "attention-long": Contender("DiT", {"mixer": "attention", "positions": False, **_MIXED}, _ATTENTION),
    "conv-long": Contender("DiT", {"mixer": "conv", "lpu": True}, {**_TUNED, "positions": _UNSET}),
    "linear-long": Contender("DiT", {"mixer": "linear", "lpu": True}, {**_TUNED, **_HEADS, "positions": _FLAG}),
    "gspn2-long": Contender("GSPN2", GSPN2_BLOCK, {**_GSPN2_OPTIONS, "norm": ("rms", "layer")}, ours=True),
    # In the U-shaped block.
    "attention-u": Contender("GSPN", {"mixer": "attention", "num_heads": 2, **_U_SHAPED}, _U_OPTIONS),
    "conv-u": Contender("GSPN", {"mixer": "conv", **_U_SHAPED}, _U_OPTIONS),
    "linear-u": Contender("GSPN", {"mixer": "linear", "num_heads": 2, **_U_SHAPED}, _U_OPTIONS),
    "neighbourhood-u": Contender("GSPN", {"mixer": "neighbourhood", "num_heads": 2, **_U_SHAPED}, _U_OPTIONS),
    "gspn-u": Contender(
        "GSPN",
        {"mixer": "gspn", **_U_SHAPED, **_NORMED},
        {"weight_groups": (None, 4, 1), **_GATES, "lpu": _FLAG, "positions": _FLAG},
        ours=True,
    ),
    "gspn-published": Contender(
        "GSPN",
        {"mixer": "gspn"},
        {"weight_groups": (None, 1), **_GATES, "long_skips": _UNSET},
        ours=True,
        fit="hidden_size",
    ),
    "gspn-published-normed": Contender(
        "GSPN",
        {"mixer": "gspn", **_NORMED},
        {"weight_groups": (None, 1), **_GATES, "long_skips": _UNSET},
        ours=True,
        fit="hidden_size",
    ),
}


def describe(setting: Setting) -> str:
    """Return a setting as a word, such as "weight_groups=4,gate_scale=1.0,positions=False"."""
    return ",".join(f"{name}={value}" for name, value in setting)


def parameters(data: DataSet, options: Mapping[str, Any]) -> int:
    """Count the parameters of a model, `create_model`'s options given, on a data set."""
    import torch

    from gspn_dit.models import create_model

    with torch.device("meta"):
        model = create_model(options["name"], data.classes, *data.latent, **_without_name(options))
    return sum(parameter.numel() for parameter in model.parameters())


def _without_name(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "name"}


def model_options(contender: str, setting: Setting, data: DataSet, size: str) -> dict[str, Any]:
    """Return the model of a contender, with `create_model`'s name and options, before parameters are made equal."""
    from gspn_dit.models.presets import DIT_PRESETS, PRESETS

    chosen = CONTENDERS[contender]
    if size not in PRESETS[chosen.family]:
        raise UserError(f"--size is {size}, but must be one of {', '.join(PRESETS[chosen.family])}")
    width = PRESETS[chosen.family][size].hidden_size
    # All that a config may say of another model is said anew.
    options = {"positions": False, "lpu": False, "hidden_size": width, "drop_path_rate": 0.0, **chosen.base}
    options |= {**dict(setting), "name": f"{chosen.family}-{size}/{data.patch}"}
    heads = DIT_PRESETS[size].num_heads
    if "num_heads" in options:
        options["num_heads"] = options["num_heads"] * heads // DIT_PRESETS["N"].num_heads
    if options["hidden_size"] == NARROWER:  # 8 divides the channels of a head
        options["hidden_size"] = 8 * heads * (width * 5 // (48 * heads))
    return {key: value for key, value in options.items() if value is not None}


@functools.cache
def reference_parameters(data: DataSet, size: str) -> int:
    """Count the parameters of the reference with its defaults, which all others have."""
    return parameters(data, model_options(REFERENCE, CONTENDERS[REFERENCE].settings(1)[0], data, size))


@functools.cache
def fitted(contender: str, setting: Setting, data: DataSet, size: str) -> dict[str, Any]:
    """Return the model of a contender with as many parameters as the reference's defaults.

    Raises UserError where no width comes within `TOLERANCE`.
    """
    options = model_options(contender, setting, data, size)
    if contender == REFERENCE and setting == CONTENDERS[REFERENCE].settings(1)[0]:
        return options
    target = reference_parameters(data, size)
    fit = CONTENDERS[contender].fit

    def filled(amount: int) -> dict[str, Any]:
        if fit == "hidden_size":
            return {**options, "hidden_size": amount}
        return {**options, "mlp_ratio": amount / options["hidden_size"]}

    best = _nearest(lambda amount: parameters(data, filled(amount)), target, 16 if fit == "hidden_size" else 1)
    found = parameters(data, filled(best))
    if abs(found / target - 1) > TOLERANCE:
        raise UserError(
            f"{contender} with {describe(setting)} has {found:,} parameters at best, but {REFERENCE} has {target:,}; "
            "give another size"
        )
    return filled(best)


def _nearest(count: Callable[[int], int], target: int, least: int) -> int:
    """Return the argument from `least` on whose count, which rises with it, is nearest to the target."""
    counted = functools.cache(count)
    low, high = least, 64 * least
    while counted(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        share = (target - counted(low)) / max(1, counted(high) - counted(low))
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if counted(middle) <= target else (low, middle)
    return min((low, high), key=lambda amount: abs(counted(amount) - target))


def train_words(options: Mapping[str, Any]) -> list[str]:
    """Return the command line of `train.py` that chooses a model."""
    from gspn_dit.config import ModelConfig

    own = {entry.name for entry in dataclasses.fields(ModelConfig)}
    keys = {name: f"model.{name}" if name in own else f"model.mixer_options.{name}" for name in options}
    words = {name: str(list(value) if isinstance(value, tuple) else value) for name, value in options.items()}
    return [word for name, value in words.items() for word in (f"--{keys[name]}", value)]
