"""The arithmetic of the comparison of mixers, what it leaves out, and that wrong mixers give no figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from benchmarks import mixer_cases, mixers
from benchmarks.mixers import Cell, Study, exponent, targets, times_faster
from gspn_dit.errors import UserError
from gspn_dit.models.mixers import ConvMixer, LinearAttentionMixer, ScanMixer
from gspn_dit.ops.cpu import projected


def cell(tokens: int, variant: str, *seconds: float, name: str = "mixer C=384") -> Cell:
    values = list(seconds)
    return Cell(name, tokens, variant, 1, values, values, values, peak_extra_bytes=1000 * tokens)


def test_exponent_is_that_of_a_power_law_of_best_times() -> None:
    cells = [cell(n, "gspn", 7e-6 * n**1.25, 1.0 * n) for n in (16, 64, 256)]
    assert exponent(cells, "mixer C=384", "gspn") == pytest.approx(1.25)
    assert exponent(cells[:1], "mixer C=384", "gspn") is None
    assert exponent(cells, "mixer C=384", "attention") is None
    skipped = Cell("mixer C=384", 1024, "gspn", skipped="too long")
    assert exponent([*cells, skipped], "mixer C=384", "gspn") == pytest.approx(1.25)


def test_ratio_is_attention_over_the_variant() -> None:
    cells = [cell(256, "attention", 6.0, 9.0), cell(256, "gspn", 2.0)]
    assert times_faster(cells, "mixer C=384", "gspn", 256) == 3.0
    assert times_faster(cells, "mixer C=384", "gspn", 1024) is None


def test_targets_are_met_missed_or_unknown() -> None:
    cells = [cell(4096, "attention", 4.0), cell(4096, "gspn", 1.0)]
    cells += [cell(16384, "attention", 9.0), cell(16384, "gspn", 1.0)]
    equal = [cell(256, v, s, name="model C=384") for v, s in (("attention", 1.0), (mixers.EQUAL, 1.25))]
    rows = targets([*cells, *equal])
    assert [row["value"] for row in rows] == [None, 4.0, 9.0, 1.25]
    assert [row["met"] for row in rows] == [None, True, False, True]


def test_what_would_end_too_late_is_skipped_and_so_is_what_is_larger() -> None:
    study = Study(repeats=1, seconds=30.0)
    assert study._reason_to_skip(20.0, None) is None
    study.cells = [cell(256, "attention", 2.0), cell(256, "gspn", 2.0)]
    for variant, seconds in (("attention", 32.0), ("gspn", 10.0)):
        study.cells.append(Cell("mixer C=384", 1024, variant))
        predicted, memory = study._predict(study.cells[-1])
        assert predicted == pytest.approx(seconds)
        study.cells[-1].skipped = study._reason_to_skip(predicted, memory)
    assert [c.skipped for c in study.cells[2:]] == ["too long: about 32 s", None]
    study.cells.append(Cell("mixer C=384", 4096, "attention"))
    assert study._predict(study.cells[-1]) == (math.inf, None)
    assert study._reason_to_skip(math.inf, None) == "too long"
    assert Study(repeats=1, seconds=1e9)._reason_to_skip(61.0, None) == "too long: about 61 s"
    assert study._reason_to_skip(1.0, 1e18) == "too large: about 1000000000 GB"


def test_equal_parameters_are_equal() -> None:
    def count(variant: str) -> int:
        with torch.device("meta"):
            module, _ = mixer_cases.build("model", 384, variant, 16)
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(mixers.EQUAL) == pytest.approx(count("attention"), rel=0.01)
    assert count("gspn") < count("attention")


def test_cells_are_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixers, "SECONDS_OF_A_CELL", 1e6)  # however busy the machine is
    monkeypatch.setattr(mixers, "LONG_SECONDS", 1e6)
    study = Study(repeats=2, seconds=60.0)
    for side in (2, 4):
        study.measure("mixer", 384, side, list(mixers.VARIANTS))
    assert [(c.tokens, c.variant) for c in study.cells] == [(n, v) for n in (4, 16) for v in mixers.VARIANTS]
    for measured in study.cells:
        entry = json.loads(json.dumps(measured.as_json()))
        assert entry["forward_backward"]["runs"] == 2
        assert 0 < entry["forward"]["best_ms"] < entry["forward_backward"]["best_ms"]
        assert entry["parameters"] > 384**2
    mixers.plot(study.cells, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_wrong_mixers_give_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mixer_cases.disagreement() is None
    right = ScanMixer.forward
    monkeypatch.setattr(ScanMixer, "forward", lambda self, tokens: 1.001 * right(self, tokens))
    with pytest.raises(UserError, match="a mixer is wrong: the scan with None groups and window None differs"):
        mixers.study([4], [384], 1, 10.0)


def test_the_scan_through_memory_runs_no_fused_kernel_forward_or_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    spies: dict[str, list[Mock]] = {}
    for variant in ("gspn", mixer_cases.THROUGH_MEMORY):
        run = mixer_cases.runner(variant, *mixer_cases.build("mixer", 384, variant, 2))
        with monkeypatch.context() as patch:
            for name in ("projected_forward", "projected_backward"):
                patch.setattr(projected, name, spy := Mock(side_effect=getattr(projected, name)))
                spies.setdefault(variant, []).append(spy)
            run()
    called = {variant: [spy.call_count for spy in pair] for variant, pair in spies.items()}
    fused = projected.fused(torch.zeros(1), torch.zeros(1))
    assert called == {mixer_cases.THROUGH_MEMORY: [1, 1], "gspn": [0, 0] if fused else [1, 1]}


def test_every_variant_is_its_mixer_with_heads_of_64_channels() -> None:
    assert {variant: type(mixer_cases.create_mixer(variant, 128)) for variant in ("linear", "conv")} == {
        "linear": LinearAttentionMixer,
        "conv": ConvMixer,
    }
    assert mixer_cases.create_mixer("attention", 128).num_heads == 2
    assert mixer_cases.create_mixer("gspn shared", 128).scan.to_logits.out_features == 4 * 3 * mixer_cases.GROUPS


def test_wrong_linear_attention_gives_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LinearAttentionMixer.forward
    monkeypatch.setattr(LinearAttentionMixer, "forward", lambda self, tokens: 1.001 * right(self, tokens))
    assert mixer_cases.disagreement() == "linear attention differs from φ(Q)φ(K)ᵀV over its sums"


def test_a_wrong_path_through_memory_gives_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    right = projected.projected_forward
    monkeypatch.setattr(projected, "projected_forward", lambda *given: 1.001 * right(*given))
    if not projected.fused(torch.zeros(1), torch.zeros(1)):
        pytest.skip("the fused kernels do not run here: both ways are the one through memory")
    problem = "the scan through memory with None groups and window None differs from the reference"
    assert mixer_cases.disagreement() == problem
