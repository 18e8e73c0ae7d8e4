"""The CUDA kernels, compiled for the host, against the reference: forward and every gradient, every regime."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from gspn_dit.ops import DIRECTIONS, gspn_scan
from gspn_dit.ops.cpu import binding as cpu
from gspn_dit.ops.cuda.devices import ARCHITECTURES, Device
from gspn_dit.ops.cuda.estimate import BLOCKS_THAT_FILL
from gspn_dit.ops.cuda.host import harness
from gspn_dit.ops.cuda.plan import plan
from gspn_dit.ops.cuda.types import SECTOR_BYTES, Geometry, Variant, straddling, widest_vector
from tests.ops.scan_cases import DTYPES, STRIDES, check_against_reference, make_inputs, scan_and_gradients

pytestmark = pytest.mark.skipif(
    harness.compiler() is None and not os.environ.get("CI"), reason="g++ builds the CUDA kernels for the host"
)

REGIMES = ("short", "cluster", "wide", "long")
SMALL = Device(threads=64)
"""Blocks of few threads: lines of more than 16 positions are cut, and the run is quick."""

Install = Callable[..., harness.Host]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that puts the CUDA kernels, run on the host, in the place of the CPU kernels."""

    def put(regime: str | None = None, device: Device = harness.H100) -> harness.Host:
        host = harness.Host()
        forward, backward = host.scans(regime, device)
        monkeypatch.setattr(cpu, "scan_forward", forward)
        monkeypatch.setattr(cpu, "scan_backward", backward)
        return host

    return put


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_shapes(install: Install, regime: str, dtype: torch.dtype) -> None:
    host = install(regime)
    for shape, window in (((2, 5, 7, 12), None), ((1, 6, 3, 8), 2), ((1, 1, 4, 4), None), ((1, 4, 1, 4), 3)):
        check_against_reference(make_inputs(shape, dtype=dtype), window=window)
    assert {launch.variant.regime for launch in host.launches} == {regime, "finish"}
    assert {launch.variant.vector for launch in host.launches} >= {
        widest_vector(regime, dtype),
        widest_vector(regime, dtype, backward=True),
        1,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_lines_cut_into_tiles_and_chunks(install: Install, dtype: torch.dtype) -> None:
    """Neighbouring blocks recompute each other's edge: nothing of what is poisoned beyond it may show."""
    host = install("long", SMALL)
    check_against_reference(make_inputs((1, 21, 37, 8), dtype=dtype), window=None)
    assert any(launch.fields.get("halo", 0) for launch in host.launches)
    assert max(launch.fields.get("tiles", 0) for launch in host.launches) > 2


@pytest.mark.parametrize("window", [None, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cluster_walks_many_chunks(install: Install, dtype: torch.dtype, window: int | None) -> None:
    """More lines than a thread keeps in registers, uneven strips, both ways through the image side by side or not."""
    host = install("cluster")
    for shape in ((1, 34, 20, 4), (1, 19, 35, 4)):
        check_against_reference(make_inputs(shape, dtype=dtype), window=window)
    side_by_side = {launch.block[2] for launch in host.launches if launch.variant.regime == "cluster"}
    assert max(side_by_side) == 1 if window == 7 else max(side_by_side) >= 2  # an odd window: they would meet in a line


def test_unused_entries_reach_nothing(install: Install) -> None:
    for regime in REGIMES:
        install(regime)
        inputs = make_inputs((1, 4, 5, 4))
        logits = inputs.weight_logits.clone()
        logits[:, :, 0, 0] = logits[:, :, 4, 1] = logits[:, 0, :, 2] = logits[:, 3, :, 3] = math.nan  # first lines
        logits[:, 0, :, :2, 0] = logits[:, 3, :, :2, 2] = math.nan  # rows beside the image
        logits[:, :, 0, 2:, 0] = logits[:, :, 4, 2:, 2] = math.inf
        unused = ~logits.isfinite()
        clean, dirty = (inputs._replace(weight_logits=logits.nan_to_num(v, v, v)) for v in (0.0, 7.0))
        expected = scan_and_gradients(clean, torch.ones_like(inputs.x), backend="cpu")
        for other in (dirty, inputs._replace(weight_logits=logits)):
            y, gradients = scan_and_gradients(other, torch.ones_like(inputs.x), backend="cpu")
            assert torch.equal(y, expected[0])
            for gradient, truth in zip(gradients, expected[1], strict=True):
                assert torch.equal(gradient, truth)
            assert bool((gradients[1][unused] == 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 2, 3, 7])
def test_every_dtype_and_window(install: Install, regime: str, dtype: torch.dtype, window: int | None) -> None:
    install(regime)
    for shape, groups in (((2, 4, 5, 8), 8), ((1, 16, 16, 12), 4), ((1, 7, 9, 6), 3), ((2, 5, 1, 5), 1)):
        check_against_reference(make_inputs(shape, groups, dtype=dtype, merge=dtype), window=window)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 8, 16])
def test_tiles_with_windows_and_groups(install: Install, dtype: torch.dtype, groups: int) -> None:
    install("long", SMALL)
    for window in (None, 5, 11):
        check_against_reference(make_inputs((1, 19, 33, 16), groups, dtype=dtype), window=window)


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_across_slabs(install: Install, regime: str, dtype: torch.dtype) -> None:
    """Sums over a group whose channels lie in several blocks, whole in one, and straddling two."""
    fewest = 128 // dtype.itemsize  # with fewer threads, no block over these short lines is as wide as a sector
    for threads in (fewest, 128):
        install(regime, Device(threads=threads))
        for channels, groups in ((90, 1), (90, 2), (90, 6), (96, 3), (72, 18), (70, 35)):
            check_against_reference(make_inputs((1, 3, 4, channels), groups, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    "directions", [("left",), ("up", "right"), ("down", "right", "up"), ("left", "up", "right", "down")]
)
def test_directions(install: Install, regime: str, directions: tuple[str, ...]) -> None:
    for device in (harness.H100, SMALL):
        install(regime, device)
        for window in (None, 4):
            inputs = make_inputs((1, 14, 11, 4), directions=len(directions), dtype=torch.bfloat16)
            check_against_reference(inputs, directions, window)


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(install: Install, regime: str, strides: str, dtype: torch.dtype) -> None:
    install(regime)
    check_against_reference(make_inputs((2, 5, 6, 8), dtype=dtype, strides=strides))


def test_takes_slices_of_one_linear_layer(install: Install) -> None:
    """Logits and gates as views of one [B, H, W, 20C] output are read where they are, in wide words."""
    host = install("short")
    batch, height, width, channels = 1, 4, 5, 8
    projected = torch.randn(batch, height, width, 20 * channels, generator=torch.Generator().manual_seed(1))
    weight_logits, input_gate, output_gate = projected.bfloat16().split(
        [12 * channels, 4 * channels, 4 * channels], dim=-1
    )
    inputs = make_inputs((batch, height, width, channels), dtype=torch.bfloat16)._replace(
        weight_logits=weight_logits.unflatten(-1, (4, 3, channels)),
        input_gate=input_gate.unflatten(-1, (4, channels)),
        output_gate=output_gate.unflatten(-1, (4, channels)),
    )
    check_against_reference(inputs)
    assert {launch.variant.vector for launch in host.launches if launch.variant.regime == "short"} == {4, 2}


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits_stay_finite(install: Install, regime: str, dtype: torch.dtype) -> None:
    install(regime)
    inputs = make_inputs((1, 4, 6, 4), dtype=dtype)
    for magnitude in (120.0, 0.99 * torch.finfo(dtype).max):
        check_against_reference(inputs._replace(weight_logits=inputs.weight_logits.sign() * magnitude))
        lowest = torch.full_like(inputs.weight_logits, -magnitude)
        check_against_reference(inputs._replace(weight_logits=lowest))


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
def test_gradcheck(install: Install, regime: str) -> None:
    install(regime)
    inputs = make_inputs((1, 3, 4, 2), dtype=torch.float64, merge=torch.float64).leaves()
    assert torch.autograd.gradcheck(lambda *a: gspn_scan(*a, window=2), inputs.tensors())


@pytest.mark.slow
@hypothesis.given(st.data())
def test_anything_goes(data: st.DataObject) -> None:
    """Any shape, groups, directions, window, dtype, strides, block size and regime."""
    per_group, groups = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    height, width = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 16))
    directions = tuple(data.draw(st.permutations(DIRECTIONS)))[: data.draw(st.integers(1, 4))]
    shape = (data.draw(st.integers(1, 2)), height, width, per_group * groups)
    dtype, strides = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(STRIDES))
    window = data.draw(st.none() | st.integers(1, 17))
    device = Device(threads=data.draw(st.sampled_from((64, 128, 1024))))
    regime = data.draw(st.sampled_from((None, "cluster", "long")))
    inputs = make_inputs(shape, groups, len(directions), dtype, strides=strides)
    with pytest.MonkeyPatch.context() as patch:
        host = harness.Host()
        forward, backward = host.scans(regime, device)
        patch.setattr(cpu, "scan_forward", forward)
        patch.setattr(cpu, "scan_backward", backward)
        check_against_reference(inputs, directions, window)


FIGURES = {
    # [B, H, W, C], G = C, bfloat16, four directions: most sectors moved over the floor, forward and backward.
    (32, 16, 16, 1152): (0.96, 1.25),
    (32, 16, 16, 1500): (1.05, 1.45),
    (32, 16, 16, 900): (1.06, 1.45),
    # Backwards in clusters, chunks of 8 of 32 lines: 5·4·3/4 + 7·4 + 20 + 1 = 64 elements of 43, less unread logits.
    (8, 32, 32, 1152): (1.00, 1.47),
    (8, 32, 32, 1500): (1.40, 1.75),
    (1, 128, 128, 256): (1.45, 1.65),
}


def bytes_ratio(shape: tuple[int, int, int, int], backward: bool, device: Device = harness.H100) -> float:
    """32 × sectors over the floor, counted over a part that stands for all."""
    geometry = Geometry(torch.bfloat16, *shape, shape[-1], (0, 1, 2, 3), 0, 8 if shape[-1] % 8 == 0 else 4)
    part, smaller = harness.whole_sectors(geometry, device, backward)
    sectors = sum(harness.count_sectors(part, backward, smaller).values())
    return SECTOR_BYTES * sectors / part.floor_bytes(backward)


@pytest.mark.slow
@pytest.mark.parametrize("shape", FIGURES)
@pytest.mark.parametrize("backward", [False, True])
def test_moves_few_bytes(shape: tuple[int, int, int, int], backward: bool) -> None:
    """The launch rule's estimate is the count, but for what rounding of warps to sectors adds."""
    counted = bytes_ratio(shape, backward)
    assert counted <= FIGURES[shape][backward]
    geometry = Geometry(torch.bfloat16, *shape, shape[-1], (0, 1, 2, 3), 0, 8 if shape[-1] % 8 == 0 else 4)
    assert counted == pytest.approx(plan(geometry, harness.H100, backward).bytes_ratio, rel=0.02)


def test_a_short_plane_moves_once() -> None:
    """Counted sectors of a plane with whole sectors per row: the floor, less what first lines need not read."""
    shape = (1, 8, 8, 128)
    # Of 22 elements per token and channel: an eighth of the lines are first ones, and two of eight positions of the
    # others have a neighbour off the line.
    unused = 4 * (3 / 8 + 7 / 8 * 2 / 8)
    assert bytes_ratio(shape, False) == pytest.approx((22 - unused) / 22, rel=1e-2)
    assert bytes_ratio(shape, True) == pytest.approx((43 - unused) / 43, rel=1e-2)


def test_one_slab_moves_what_each_of_them_does() -> None:
    geometry = Geometry(torch.bfloat16, 2, 40, 24, 64, 64, (0, 1, 2, 3), 0)
    device = Device(processors=256, clusters=0)
    part, smaller = harness.whole_sectors(geometry, device, False)
    assert (part.batch, part.channels) == (1, 16) and smaller.processors == 32
    share = geometry.tokens * geometry.channels // (part.tokens * part.channels)
    whole = harness.count_sectors(geometry, False, device)
    assert whole == {name: share * count for name, count in harness.count_sectors(part, False, smaller).items()}
    # Rows of 12 channels begin within a sector, and shared weights with a group: no slab stands for the others.
    for channels, groups in ((12, 12), (64, 2)):
        other = replace(geometry, channels=channels, groups=groups)
        assert harness.whole_sectors(other, device, False)[0].channels == channels


@pytest.mark.slow
def test_sums_go_through_memory_where_blocks_do_not_reach_each_other() -> None:
    """Without clusters, sums over directions that fit no block are stored and read in float32: see cuda/README.md."""
    ampere = ARCHITECTURES["sm_80"]
    assert bytes_ratio((1, 64, 64, 64), False, ampere) <= 1.75
    assert bytes_ratio((1, 64, 64, 64), True, ampere) <= 2.0


def test_clusters_only_where_the_device_has_them() -> None:
    for shape, backward in (((1, 128, 128, 256), False), ((8, 32, 32, 1152), True)):
        geometry = Geometry(torch.bfloat16, *shape, shape[-1], (0, 1, 2, 3), 0)
        assert plan(geometry, harness.H100, backward).regime == "cluster"
        assert plan(geometry, replace(harness.H100, clusters=0), backward).regime == "long"
    # Sums of 200×200 tokens fit in eight blocks for 8 channels, half a sector each: long lines move fewer.
    for channels, regime in ((8, "cluster"), (16, "wide")):
        geometry = Geometry(torch.bfloat16, 1, 200, 200, channels, channels, (0, 1, 2, 3), 0)
        assert plan(geometry, harness.H100, False).regime == regime
    with pytest.raises(ValueError, match=r"128×128 do not fit the cluster-line kernels"):
        plan(Geometry(torch.bfloat16, 1, 128, 128, 8, 8, (0,), 0), Device(clusters=0), False, "cluster")


def test_more_tokens_than_kernels_count_are_refused() -> None:
    """They count B·H·W·D in 32 bits."""
    geometry = Geometry(torch.bfloat16, 2**14, 2**8, 2**8, 8, 8, (0, 1, 2, 3), 0)
    with pytest.raises(ValueError, match="4294967296 tokens of all directions, but"):
        plan(geometry, harness.H100, True)
    assert plan(replace(geometry, batch=2**14 - 1), harness.H100, True).launches


def test_directions_side_by_side_never_meet_in_a_line() -> None:
    """Two directions from opposite ends add to the same sums: at the same time only if lines are odd in number."""
    for size, members in (((16, 20), 2), ((16, 21), 1), ((15, 20), 1)):
        geometry = Geometry(torch.float32, 1, *size, 8, 8, (0, 1, 2, 3), 0)
        assert plan(geometry, harness.H100, False, "cluster").launches[0].block[2] == members
    geometry = Geometry(torch.float32, 1, 15, 20, 8, 8, (1, 0, 2), 0)
    assert plan(geometry, harness.H100, False, "cluster").launches[0].block[2] == 2


def test_straddling() -> None:
    assert straddling(1152, 64, 2) == 1.0
    # Rows of 3000 bytes start 0, 24, 16 and 8 bytes into a sector and touch 94, 95, 95 and 94 of them.
    assert straddling(1500, 1500, 2) == pytest.approx(94.5 * 32 / 3000)


def test_large_images_take_few_launches() -> None:
    """Where clusters share lines; elsewhere blocks recompute each other's edges: few bytes, most of the bandwidth."""
    geometry = Geometry(torch.bfloat16, 1, 1024, 1024, 64, 64, (0, 1, 2, 3), 0)
    for backward in (False, True):
        todo = plan(geometry, harness.H100, backward)
        assert todo.regime == "wide"
        assert len(todo.launches) <= (24 if backward else 8)
        tiles = plan(geometry, harness.H100, backward, "long")
        fewest = min(math.prod(launch.grid) for launch in tiles.launches if launch.variant.regime == "long")
        assert fewest >= 0.75 * BLOCKS_THAT_FILL * harness.H100.processors
        assert tiles.bytes_ratio <= (2.2 if backward else 2.0)
        for launch in (*todo.launches, *tiles.launches):
            assert launch.shared_bytes < harness.H100.shared_bytes
            assert math.prod(launch.block) <= 1024


def test_the_variant_follows_alignment_and_groups() -> None:
    geometry = Geometry(torch.bfloat16, 1, 16, 16, 1500, 1500, (0,), 0, alignment=4)
    assert geometry.variant("short", False) == Variant("short", torch.bfloat16, 4, False)
    assert geometry.variant("short", True) == Variant("short", torch.bfloat16, 2, False, backward=True)
    assert geometry.variant("long", True).vector == 4
    assert replace(geometry, alignment=2).variant("long", False).vector == 2
    assert replace(geometry, channels=6, groups=2).variant("short", False).vector == 1  # three channels per group
