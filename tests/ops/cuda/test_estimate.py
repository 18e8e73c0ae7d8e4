"""What a device holds, how long launches take by the model, and which way to run a pass that makes the best."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gspn_dit.ops.cuda.devices import ARCHITECTURES, Device, fewest_clusters, has_clusters
from gspn_dit.ops.cuda.estimate import LineCost, Score, best, estimate, estimate_all, score
from gspn_dit.ops.cuda.plan import plan
from gspn_dit.ops.cuda.types import Geometry, Launch, Variant

SMALL = Device(processors=2, clusters=1, bandwidth_gbs=1000.0, clock_ghz=1.0)
"""A byte per picosecond, a clock per nanosecond."""
COST = LineCost(instructions=128.0, special=64.0, steps=1, registers=32)
VARIANT = Variant("short", torch.bfloat16, 4, False)
LAUNCH = Launch(VARIANT, "gspn_scan_forward_kernel", (3, 1, 1), (4, 16, 1), 0, {}, lines=32)
"""Three blocks of two warps that walk 32 lines."""


def test_a_multiprocessor_holds_what_its_tables_say() -> None:
    """Examples of NVIDIA's occupancy tables for 8.0: threads, registers, shared memory and blocks bind once each."""
    ampere = ARCHITECTURES["sm_80"]
    assert ampere.resident(32, 256, 0) == 8
    assert ampere.resident(128, 512, 0) == 1
    assert ampere.resident(64, 512, 100 * 1024) == 1
    assert ampere.resident(32, 32, 0) == 32


def test_clusters_are_fewer_than_their_blocks_would_fit() -> None:
    """Groups of 18 multiprocessors hold two clusters of eight blocks, and two stay idle."""
    assert (fewest_clusters(132), fewest_clusters(148), fewest_clusters(17)) == (14, 16, 0)
    assert Device().at_once(1, 1) == 132 and Device().at_once(2, 8) == 2 * 14 * 8
    assert replace(Device(), clusters=15).at_once(1, 8) == 120
    assert Device().at_once(1, 2) == 132 and Device().at_once(1, 4) == 112
    assert [major for major in (7, 8, 9, 10, 11, 12) if has_clusters(major)] == [9, 10]  # 12.0: 99 KB per block
    assert all(bool(ARCHITECTURES[name].clusters) == (name in ("sm_90", "sm_100")) for name in ARCHITECTURES)


def test_a_part_of_a_device_is_as_fast_for_a_part_of_the_work() -> None:
    assert Device().share(1, 4) == replace(Device(), processors=33, clusters=4, bandwidth_gbs=3350 / 4)
    assert replace(Device(), clusters=0).share(1, 4).clusters == 0


def test_blocks_run_in_waves() -> None:
    """Of three blocks two run at once, one on each multiprocessor, then the third alone."""
    found = estimate(LAUNCH, SMALL, COST, 1, 6e6)
    assert found.waves == 1.5
    # A block alone draws 1 / (0.7 · 2) of the bandwidth, two all of it: 4 MB at 1000 GB/s, 2 MB at 714.
    assert found.bytes_ms == pytest.approx(4e-3 + 2e-3 * 1.4)
    # Per wave, two warps of 32 lines of 128 instructions, four a clock; 64 of them special, of 32 lanes, 16 a clock.
    assert found.issue_ms == pytest.approx(2 * 2 * 32 * 128 / 4 / 1e6)
    assert found.special_ms == pytest.approx(2 * 2 * 32 * 64 * 32 / 16 / 1e6)
    assert found.latency_ms == pytest.approx(2 * 32 * 150 / 1e6)
    assert (found.bound, found.milliseconds) == ("special", found.special_ms)
    # Two blocks on each multiprocessor at once: one wave, of which the busiest has two blocks.
    together = estimate(LAUNCH, SMALL, COST, 2, 6e6)
    assert (together.waves, together.bytes_ms) == (0.75, pytest.approx(6e-3))
    assert (together.issue_ms, together.latency_ms) == (pytest.approx(4.096e-3), pytest.approx(4.8e-3))


@pytest.mark.parametrize(
    ("moved", "cost", "bound"),
    [
        (1e9, COST, "bytes"),
        (1e3, replace(COST, instructions=1280.0), "issue"),
        (1e3, COST, "special"),
        (1e3, replace(COST, special=1.0), "latency"),
    ],
)
def test_each_bound_can_bind(moved: float, cost: LineCost, bound: str) -> None:
    found = estimate(LAUNCH, SMALL, cost, 1, moved)
    assert found.bound == bound and found.milliseconds == getattr(found, f"{bound}_ms")


def test_what_is_not_known_bounds_nothing() -> None:
    assert estimate(LAUNCH, SMALL, COST, 1, None).milliseconds is None
    without_code = estimate(LAUNCH, SMALL, None, 1, 6e6)
    assert (without_code.bound, without_code.milliseconds) == ("bytes", without_code.bytes_ms)


def test_launches_follow_each_other() -> None:
    """They share the bytes by their blocks."""
    double = replace(LAUNCH, grid=(6, 1, 1))
    found = estimate_all([LAUNCH, double], SMALL, COST, 1, 9e6)
    one, two = estimate(LAUNCH, SMALL, COST, 1, 3e6), estimate(double, SMALL, COST, 1, 6e6)
    assert found == one + two and found.waves == two.waves == 3.0
    assert found.latency_ms == pytest.approx((2 + 3) * 32 * 150 / 1e6)


def test_clusters_wait_for_each_other() -> None:
    """Sixteen clusters where fifteen run at once are two waves; with a block less of channels they are one."""
    device = replace(Device(), clusters=15)
    launch = replace(LAUNCH, variant=replace(VARIANT, regime="cluster"), grid=(128, 1, 1))
    two = estimate(launch, device, COST, 1, None)
    one = estimate(replace(launch, grid=(120, 1, 1)), device, COST, 1, None)
    assert one.latency_ms is not None and two.latency_ms == pytest.approx(2 * one.latency_ms)


def test_of_ways_that_are_about_as_fast_the_one_that_moves_least_is_best() -> None:
    ways = {"slow": (3.0, 1, 3.0), "fast": (1.0, 9, 1.0), "lean": (1.2, 5, 2.0), "quick": (1.2, 5, 1.5)}
    assert best(list(ways), lambda name: Score(*ways[name])) == "quick"
    ways["alike"] = (1.2, 5, 1.45)
    assert best(list(ways), lambda name: Score(*ways[name])) == "quick"  # which came first


def test_a_block_alone_on_its_multiprocessor_takes_longer() -> None:
    device = Device()
    with_others = score(replace(LAUNCH, shared_bytes=100 * 1024), device, 1e9)
    alone = score(replace(LAUNCH, shared_bytes=200 * 1024), device, 1e9)
    assert alone.milliseconds - 0.006 == pytest.approx(1.05 * (with_others.milliseconds - 0.006))


@pytest.mark.parametrize("backward", [False, True])
def test_few_images_are_cut_more_finely(backward: bool) -> None:
    """One image of the ImageNet grid takes at least as many blocks as draw the whole bandwidth, if sectors allow."""
    geometry = Geometry(torch.bfloat16, 1, 16, 16, 1152, 1152, (0, 1, 2, 3), 0)
    one = plan(geometry, Device(), backward).launches[0]
    many = plan(replace(geometry, batch=64), Device(), backward).launches[0]
    assert one.fields["slab"] == 16 and many.fields["slab"] != 16 and many.blocks >= 2 * 132


def test_long_lines_on_an_ampere_trade_halos_for_launches() -> None:
    """Tiles of a narrow image of 200 positions: a chunk of 15 lines recomputes 30 positions for each 34 to 64 owned."""
    geometry = Geometry(torch.bfloat16, 1, 200, 200, 16, 16, (0, 1, 2, 3), 0)
    todo = plan(geometry, ARCHITECTURES["sm_80"], False)
    assert todo.regime == "long" and todo.bytes_ratio < 3.5 and len(todo.launches) <= 32


@pytest.mark.parametrize("regime", ["short", "cluster", "wide", "long"])
@pytest.mark.parametrize("backward", [False, True])
def test_few_channels_leave_no_lane_idle(regime: str, backward: bool) -> None:
    """GSPN-2 propagates eight channels: two lanes of four, or four of two."""
    geometry = Geometry(torch.bfloat16, 16, 16, 16, 8, 8, (0, 1, 2, 3), 0)
    launch = plan(geometry, Device(), backward, regime).launches[0]
    assert launch.block[0] * launch.variant.vector == 8


def test_segments_of_windows_run_side_by_side_where_few_blocks_wait() -> None:
    geometry = Geometry(torch.bfloat16, 4, 16, 16, 8, 8, (0, 1, 2, 3), 4)
    launch = plan(geometry, Device(), False).launches[0]
    assert launch.block[2] == 4 and launch.lines == 4 * 4
    whole = plan(replace(geometry, window=0), Device(), False).launches[0]
    assert whole.block[2] == 1 and whole.lines == 4 * 16


def test_blocks_of_few_threads_share_sectors_where_no_others_fit() -> None:
    """Eight lanes of a float fill a sector, and leave 64 threads fewer positions than a halo takes."""
    geometry = Geometry(torch.float32, 1, 9, 7, 5, 5, (0, 1, 2, 3), 0, 1)
    todo = plan(geometry, Device(threads=64), False, "long")
    assert max(launch.block[0] for launch in todo.launches if launch.variant.regime == "long") < 8
