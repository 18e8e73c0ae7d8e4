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


_RIVALS = "attention-tuned conv-tuned linear-tuned gspn2"
_JUDGE = "runs/fashion_judge"
"""The feature extractor of Fashion-MNIST, which docs/quality.md trains."""
PRESETS = {
    "claims": Preset(
        "--data digits fashion --contenders attention attention-lpu gspn-plain gspn gspn-published "
        "gspn-published-normed --only fashion=attention,gspn-plain --seconds digits=15 fashion=60 "
        f"--budgets 1 --hours 2 --jobs 2 --trials 2 --drop options equal-steps --features fashion={_JUDGE}",
        "claims: what was said of scans before there were GSPN2's parts, at 16 and 64 tokens; one budget, defaults of "
        "all options, attention as the only rival; without equal steps",
    ),
    "small": Preset(
        f"--data digits fashion fashion-latents fashion-256 --contenders {_RIVALS} "
        "--seconds digits=8 fashion=20 fashion-latents=20 fashion-256=30 "
        "--budgets 1 4 --hours 5 --jobs 2 --trials 2 --drop options equal-steps early-scores "
        f"--features fashion={_JUDGE} fashion-latents={_JUDGE} fashion-256={_JUDGE}",
        "small: 16, 64 (pixels and latents) and 256 tokens, scored at four times the budget alone, options as "
        "benchmarks.block found them; without equal steps, DiT as published, the U-shaped block, scans without a norm "
        "and neighbourhood attention",
    ),
    "long": Preset(
        f"--data emoji-1024 --contenders {_RIVALS} --seconds 45 "
        "--budgets 1 4 --hours 5 --jobs 2 --trials 2 --drop options early-scores",
        "long: 1,024 tokens, scored at four times the budget alone, options as benchmarks.block found them; without "
        "DiT as published, the U-shaped block, scans without a norm and neighbourhood attention",
    ),
    "searched": Preset(
        "--data emoji-1024 --contenders attention-long conv-long linear-long gspn2-long --seconds 45 "
        "--budgets 1 4 --hours 5 --jobs 2 --trials 2 --drop options equal-steps early-scores "
        "--features emoji-1024=runs/emoji64_judge",
        "searched: 1,024 tokens, scored at four times the budget alone, options as benchmarks.block found them with as "
        "many; without equal steps, DiT as published, the U-shaped block, scans without a norm and neighbourhood "
        "attention",
    ),
    "longest": Preset(
        "--data emoji-4096 --contenders conv-long linear-long gspn2-long --seconds 45 "
        "--budgets 1 4 --hours 5 --jobs 2 --trials 2 --drop options equal-steps early-scores "
        "--features emoji-4096=runs/emoji64_judge",
        "longest: 4,096 tokens, scored at four times the budget alone, options as benchmarks.block found them with "
        "1,024; without equal steps, and without attention, which would take fewer than twenty steps",
    ),
    "sizes": Preset(
        "--data emoji-sizes --contenders attention-interpolated linear-tuned gspn2 gspn2-free --seconds 150 "
        "--budgets 1 --hours 3 --jobs 2 --trials 2 --drop options equal-steps",
        "sizes: trained at two sizes, for benchmarks.resolution; one budget, options as benchmarks.block found them; "
        "without equal steps, convolution, and attention whose positions are not interpolated in training",
    ),
}
