"""The table of classification models: committed sizes are those of the code, and rows by hand."""

from __future__ import annotations

import json

from benchmarks.backbones import backbones_table
from benchmarks.study import ROOT


def test_committed_sizes_are_those_of_the_models() -> None:
    import torch

    from gspn_dit.models.backbones import BACKBONES, create_backbone

    committed = json.loads((ROOT / "benchmarks" / "results" / "backbones.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in committed["models"]] == list(BACKBONES)
    for facts in committed["models"]:
        with torch.device("meta"):
            model = create_backbone(facts["name"])
        assert sum(parameter.numel() for parameter in model.parameters()) == facts["parameters"]
        assert model.multiply_adds(facts["size"], facts["size"]) == facts["multiply_adds"]


def test_rows_by_hand() -> None:
    text = backbones_table(
        {
            "gpus": 8,
            "models": [
                {
                    "name": "a",
                    "size": 224,
                    "parameters": 31_337_468,
                    "multiply_adds": 5.235e9,
                    "published": [30, 5, 83],
                },
                {"name": "b", "size": 32, "parameters": 742_520, "multiply_adds": 2e7, "published": None},
            ],
            "recipes": [
                {
                    **{"recipe": "a.yaml", "steps": 187_671, "batch": 2048, "flop": 1.21e19, "micro_batch": 256},
                    **{"memory_bytes": 28.14e9, "checkpoint_bytes": 5.01e8},
                }
            ],
            "peers": {"Net (1234.5678)": [[29, 4.5, 81.3]]},
            "software": {"commit": "abc"},
        }
    )
    assert text.splitlines()[2:5] == [
        "| `a` | 31.34M | 5.24 | 30M | 5.0 | 83.0 |",
        "| `b` | 0.74M | 0.02 at 32² | – | – | – |",
        "| Net (1234.5678), T |  |  | 29M | 4.5 | 81.3 |",
    ]
    assert "| `a.yaml` | 187,671 × 2,048 | 1.21e+19 | 28.1 GB (256 images) | 0.50 GB |" in text
