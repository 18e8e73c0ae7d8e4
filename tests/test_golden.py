"""Golden samples: the stored ones are drawn again on this machine, and what differs is told."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from gspn_dit import doctor, golden
from gspn_dit.golden import Comparison, compare, golden_file


def test_this_machine_draws_the_stored_samples() -> None:
    stored = load_file(golden_file())["latents"]
    assert stored.shape == (10, 1, 8, 8) and 0.5 < stored.abs().max() < 2
    assert golden_file().stat().st_size < 10_000
    found = compare("cpu")
    assert found.passed and found.allowed == 1e-4


def test_what_differs_is_told_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = load_file(golden_file())["latents"]
    for change, code, words in (
        (0.0, 0, "golden samples on cpu: equal bit for bit"),
        (5e-5, 0, "golden samples on cpu: differ by 5e-05, 0.0001 is allowed"),
        (0.25, 1, "differ by 0.25, 0.0001 is allowed\nthis machine computes something else"),
        (float("nan"), 1, "differ by inf"),
    ):
        changed = stored.clone()
        changed[3, 0, 2, 2] += change
        monkeypatch.setattr(golden, "draw", lambda device, latents=changed: latents)
        with pytest.raises(SystemExit) as ended:
            doctor.main(["--golden", "--device", "cpu"])
        assert ended.value.code == code
        assert words in capsys.readouterr().out
    with pytest.raises(SystemExit):
        doctor.main(["--golden", "--device", "cpu", "--json"])
    printed = json.loads(capsys.readouterr().out.replace("Infinity", '"inf"'))
    assert printed == {"device": "cpu", "difference": "inf", "allowed": 1e-4, "passed": False}


def test_other_devices_may_differ_more() -> None:
    assert Comparison("cuda:1", 5e-4, golden.OTHER_DIFFERENCE).passed
    assert not Comparison("cpu", 5e-4, golden.LARGEST_DIFFERENCE["cpu"]).passed


@pytest.mark.gpu
def test_a_gpu_draws_the_stored_samples() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert compare("cuda").passed
