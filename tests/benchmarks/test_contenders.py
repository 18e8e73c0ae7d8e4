"""Who takes part in a study of quality: as many settings and parameters for each, in both blocks."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.contenders import (
    CONTENDERS,
    REFERENCE,
    TOLERANCE,
    describe,
    fitted,
    model_options,
    parameters,
    reference_parameters,
    train_words,
)
from benchmarks.protocol import Protocol
from benchmarks.scoring import DATA_SETS
from gspn_dit.config import parse_train_arguments
from gspn_dit.errors import UserError
from gspn_dit.models import create_model
from gspn_dit.models.mixers import MIXERS

DIGITS = DATA_SETS["digits"]


def test_every_mixer_is_there_in_both_blocks() -> None:
    there = {(contender.family, contender.base["mixer"]) for contender in CONTENDERS.values()}
    assert there == {(family, mixer) for family in ("DiT", "GSPN") for mixer in MIXERS} | {("GSPN2", "gspn")}
    assert {name for name, contender in CONTENDERS.items() if contender.ours} == {
        name for name, contender in CONTENDERS.items() if contender.base["mixer"] == "gspn"
    }


@pytest.mark.parametrize("name", CONTENDERS)
def test_settings_begin_with_the_defaults_and_are_the_same_every_time(name: str) -> None:
    contender, trials = CONTENDERS[name], Protocol.trials
    settings = contender.settings(trials)
    assert len(set(settings)) == trials
    assert settings == contender.settings(trials)
    assert dict(settings[0]) == {option: values[0] for option, values in contender.options.items()}
    assert all(value in contender.options[option] for setting in settings for option, value in setting)
    with pytest.raises(UserError, match=r"--trials is 1000, but a contender has \d+ settings; give fewer"):
        contender.settings(1000)


def test_no_option_of_gspn2_keeps_the_preset_s_value_by_another_name() -> None:
    """None does, so that a search would train one model twice."""
    gspn2 = [contender for contender in CONTENDERS.values() if contender.family == "GSPN2"]
    assert gspn2 and not any(None in values for contender in gspn2 for values in contender.options.values())


@pytest.mark.parametrize("name", CONTENDERS)
def test_parameters_are_equal_and_the_command_line_makes_that_model(name: str) -> None:
    """Of the last setting, which is no default."""
    setting = CONTENDERS[name].settings(Protocol.trials)[-1]
    options = fitted(name, setting, DIGITS, "N")
    target = reference_parameters(DIGITS, "N")
    assert abs(parameters(DIGITS, options) / target - 1) <= TOLERANCE
    words = [*DIGITS.arguments(), *train_words(options)]
    model = parse_train_arguments(words).config.model
    made = create_model(model.name, 10, 1, 8, **model.overrides())
    assert sum(p.numel() for p in made.parameters()) == parameters(DIGITS, options)
    assert all(model.overrides()[option] == value for option, value in setting if value is not None)


@pytest.mark.parametrize("name", ["attention", "gspn-u"])
def test_what_a_config_says_of_its_own_model_is_no_contenders(name: str) -> None:
    """The config of emoji is of scans with lpu and positions, and wider."""
    setting = CONTENDERS[name].settings(1)[0]
    models = []
    for data in (DIGITS, DATA_SETS["emoji-256"]):
        words = [*data.arguments(), *train_words(fitted(name, setting, data, "N"))]
        models.append(parse_train_arguments(words).config.model.overrides() | {"mlp_ratio": None})
    assert models[0] == models[1]


def test_an_unknown_size() -> None:
    with pytest.raises(UserError, match=r"--size is M, but must be one of N, T, S, B, L, XL"):
        fitted("gspn-u", CONTENDERS["gspn-u"].settings(1)[0], DIGITS, "M")


def test_a_size_that_cannot_be_equal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.contenders.TOLERANCE", 1e-9)
    setting = CONTENDERS["gspn-published"].settings(2)[1]
    with pytest.raises(UserError, match=r"gspn-published with weight_groups=.* has [\d,]+ parameters at best, but"):
        fitted("gspn-published", setting, DATA_SETS["fashion-256"], "N")


def test_tokens_of_the_data_sets() -> None:
    expected: dict[str, Any] = {"digits": 16, "fashion": 64, "fashion-latents": 64, "fashion-256": 256}
    expected |= {"emoji": 64, "emoji-256": 256, "emoji-1024": 1024, "emoji-4096": 4096, "emoji-sizes": 256}
    assert {name: source.tokens for name, source in DATA_SETS.items()} == expected


def test_heads_and_widths_grow_with_the_size() -> None:
    models = [
        model_options(name, CONTENDERS[name].settings(1)[0], DATA_SETS["fashion-latents"], size)
        for name, size in (("attention", "N"), ("attention", "S"), ("attention-u", "N"), ("attention-u", "S"))
    ]
    assert [model["num_heads"] for model in models] == [2, 6, 2, 6]
    assert [model["hidden_size"] for model in models] == [64, 384, 80, 288]


def test_a_setting_as_a_word() -> None:
    assert describe((("weight_groups", None), ("lpu", True))) == "weight_groups=None,lpu=True"
    assert REFERENCE in CONTENDERS
