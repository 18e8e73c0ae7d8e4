"""The comparison of objectives: what is compared, and how its JSON is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import objectives
from gspn_dit.config import flatten, load_config
from gspn_dit.diffusion import create_objective


def test_the_demos_differ_in_what_they_learn_and_in_their_length_alone() -> None:
    velocity, epsilon = (
        dict(flatten(load_config(objectives.ROOT / "configs" / name).to_dict())) for name in objectives.CONFIGS.values()
    )
    different = {key for key in velocity if velocity[key] != epsilon[key]}
    different -= {"output_dir", "training.max_steps", "sampling.sampler", "sampling.guidance_scale"}
    assert different == {"objective.name"}
    assert (velocity["objective.name"], epsilon["objective.name"]) == tuple(objectives.CONFIGS)


def figures(agreement: float) -> dict[str, Any]:
    return {"samplers": {}, "met": {"class_agreement": agreement >= objectives.LEAST_AGREEMENT}}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["objectives", *arguments])
    objectives.main()


def test_one_objective_alone_leaves_the_other_in_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, agreement = tmp_path / "out.json", {"velocity": 0.99, "epsilon": 0.91}
    monkeypatch.setattr(objectives, "measure", lambda objective, runs: figures(agreement[objective]))
    run(monkeypatch, "--out", str(out))
    assert list(json.loads(out.read_text())["objectives"]) == ["velocity", "epsilon"]
    agreement["epsilon"] = 0.95
    monkeypatch.setattr(objectives, "measure", lambda objective, runs: {**figures(1), "new": objective})
    run(monkeypatch, "--only", "epsilon", "--out", str(out))
    results = json.loads(out.read_text())["objectives"]
    assert "new" not in results["velocity"]
    assert results["epsilon"]["new"] == "epsilon"


def test_a_missed_target_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(objectives, "measure", lambda objective, runs: figures(0.89))
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--out", str(tmp_path / "out.json"))
    assert caught.value.code == 1
    assert not json.loads((tmp_path / "out.json").read_text())["objectives"]["epsilon"]["met"]["class_agreement"]


@pytest.mark.parametrize("objective", ["velocity", "epsilon"])
def test_the_number_of_steps_suits_every_sampler(objective: str) -> None:
    config = load_config(objectives.ROOT / "configs" / objectives.CONFIGS[objective])
    created = create_objective(config.objective)
    for name in created.samplers:
        assert created.resolve_sampler(name, objectives.STEPS) == name
