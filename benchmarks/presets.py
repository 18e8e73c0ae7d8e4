"""Studies of quality that are ready to run: `python -m benchmarks.quality --preset NAME`.

What a preset does without are cells, never seeds, learning rates of a grid, or a contender's own best rate.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """The command line of a study, and what it leaves out of the whole one."""

    command: str
    reason: str

    @property
    def words(self) -> list[str]:
        """Of the command line."""
        return self.command.split()


_DEFAULTS = "--trials 2 --drop options equal-steps"
PRESETS = {
    "claims": Preset(
        "--data digits fashion --contenders attention attention-lpu gspn-plain gspn gspn-published "
        "gspn-published-normed --only fashion=attention,gspn-plain --seconds digits=15 fashion=60 "
        f"--budgets 1 --hours 2 --jobs 2 {_DEFAULTS}",
        "claims: what was said of scans before there were GSPN2's parts, at 16 and 64 tokens; one budget, defaults of "
        "all options, attention as the only rival; without equal steps",
    ),
    "small": Preset(
        "--data digits fashion fashion-256 --contenders attention attention-tuned conv-tuned linear-tuned gspn2 "
        "--only digits=attention,attention-tuned,gspn2 fashion-256=attention,attention-tuned,gspn2 "
        f"--seconds digits=20 fashion=40 fashion-256=50 --budgets 1 4 --hours 5 --jobs 2 {_DEFAULTS}",
        "small: 16, 64 and 256 tokens, two budgets, options as benchmarks.block found them; without equal steps, the "
        "U-shaped block, scans without a norm, neighbourhood attention, and without convolution and linear attention "
        "at 16 and 256 tokens",
    ),
    "long": Preset(
        "--data emoji-1024 --contenders attention-tuned conv-tuned linear-tuned gspn2 --seconds 45 "
        f"--budgets 1 4 --hours 5 --jobs 2 {_DEFAULTS} early-scores",
        "long: 1,024 tokens, scored at four times the budget alone, options as benchmarks.block found them; without "
        "equal steps, DiT as published, the U-shaped block, scans without a norm and neighbourhood attention",
    ),
    "sizes": Preset(
        "--data emoji-sizes --contenders attention attention-interpolated gspn2 gspn2-free --seconds 150 "
        f"--budgets 1 --hours 3 --jobs 2 {_DEFAULTS}",
        "sizes: trained at two sizes, for benchmarks.resolution; one budget, options as benchmarks.block found them; "
        "without equal steps, and with attention alone of the rivals",
    ),
}
