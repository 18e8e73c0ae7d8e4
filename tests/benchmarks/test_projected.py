"""The benchmark of the projected scan: its gate, and a report from tiny shapes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import projected as benchmark
from gspn_dit.errors import UserError
from gspn_dit.ops.cpu import projected

pytestmark = pytest.mark.skipif(
    not projected.fused(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)), reason="the fused kernels do not run here"
)


def test_no_figure_while_the_kernels_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = projected.scan_forward
    monkeypatch.setattr(projected, "scan_forward", lambda *arguments: right(*arguments) * 1.0001)
    with pytest.raises(UserError, match=r"kernels are wrong: y differs by 1\.0e-04 at \[1, 8, 8, 48\]"):
        benchmark.measure(0, True, 1)


@pytest.mark.slow
def test_report_of_tiny_shapes() -> None:
    report = benchmark.run(quick=True, repeats=2)
    assert [row["groups"] for row in report["cases"]] == [48, 3]
    for row in report["cases"]:
        for name in ("forward", "forward_backward"):
            assert row[name]["times_faster"] > 0
            assert set(row[name]["peak_extra_bytes"]) == set(benchmark.WAYS)
