"""NVRTC's PTX of the kernels, run on the CPU: single instructions, every regime, faults that must show."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gspn_dit.ops import gspn_scan
from gspn_dit.ops.cpu import binding as cpu
from gspn_dit.ops.cuda.devices import Device
from gspn_dit.ops.cuda.host import harness
from gspn_dit.ops.cuda.host.ptx.grammar import PtxError, parse
from gspn_dit.ops.cuda.host.ptx.host import PtxHost, cached_ptx, translated
from gspn_dit.ops.cuda.host.ptx.translate import translate
from gspn_dit.ops.cuda.types import Variant
from tests.ops.cuda.test_projected import check
from tests.ops.cuda.test_projected_backward import check as check_backward
from tests.ops.scan_cases import DTYPES, check_against_reference, make_inputs, scan_and_gradients
from tests.ops.test_projected import draw

pytestmark = [
    pytest.mark.skipif(harness.compiler() is None and not os.environ.get("CI"), reason="g++ builds translated PTX"),
    pytest.mark.skipif(
        importlib.util.find_spec("cupy") is None and not os.environ.get("CI"), reason="CuPy brings NVRTC"
    ),
]

REGIMES = ("short", "cluster", "wide", "long")
SMALL = Device(threads=64)
Install = Callable[..., PtxHost]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that puts the compiled kernels in the place of the CPU kernels."""

    def put(regime: str | None = None, device: Device = harness.H100, **options: object) -> PtxHost:
        host = PtxHost(**options)  # type: ignore[arg-type]
        forward, backward = host.scans(regime, device)
        monkeypatch.setattr(cpu, "scan_forward", forward)
        monkeypatch.setattr(cpu, "scan_backward", backward)
        return host

    return put


def kernel(body: str) -> str:
    """A module of one kernel with the parameter `out`, whose address is in %rd1."""
    return (
        ".version 8.7\n.target sm_90\n.address_size 64\n.visible .entry main(.param .u64 out)\n{\n"
        ".reg .b64 %rd<3>;\nld.param.u64 %rd1, [out];\n" + body + "\nret;\n}\n"
    )


def launch(ptx: str, out: Tensor, threads: int = 32, shared_bytes: int = 0) -> str:
    """Run a kernel of one block on a tensor; return what is wrong with it, or ""."""
    built = translated(ptx)
    built.host_cuda_unwritten_fails(1)
    address = (ctypes.c_uint64 * 1)(out.data_ptr())
    built.host_cuda_memory(address, (ctypes.c_uint64 * 1)(out.untyped_storage().nbytes()), 1)
    grid, block = (ctypes.c_uint * 3)(1, 1, 1), (ctypes.c_uint * 3)(threads, 1, 1)
    status = built.host_cuda_launch(b"main", grid, block, shared_bytes, bytes(address))
    return built.host_cuda_message().decode() if status else ""


ONE, TWO, THREE, TINY, NAN, INF = "0f3F800000", "0f40000000", "0f40400000", "0f00000001", "0f7FC00000", "0f7F800000"
RESULTS = {
    # Instruction with the result r: the 32 bits that r then has, from the PTX ISA by hand.
    "add.s32 r, 2147483647, 1": 0x80000000,
    "sub.s32 r, 3, 5": 0xFFFFFFFE,
    "mul.lo.s32 r, -3, 5": 0xFFFFFFF1,
    "mul.hi.u32 r, 0xFFFFFFFF, 0xFFFFFFFF": 0xFFFFFFFE,
    "mul.hi.s32 r, -1, 5": 0xFFFFFFFF,
    "mad.lo.s32 r, 7, 6, -2": 40,
    "div.s32 r, -7, 2": 0xFFFFFFFD,
    "rem.s32 r, -7, 2": 0xFFFFFFFF,
    "div.u32 r, -7, 2": 0x7FFFFFFC,
    "shl.b32 r, 1, 32": 0,
    "shr.s32 r, -8, 1": 0xFFFFFFFC,
    "shr.u32 r, -8, 1": 0x7FFFFFFC,
    "shr.s32 r, -8, 40": 0xFFFFFFFF,
    "shf.l.wrap.b32 r, 0x80000000, 1, 33": 3,
    "shf.r.clamp.b32 r, 5, 7, 40": 7,
    "lop3.b32 r, 0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA, 0x96": 0x96969696,
    "prmt.b32 r, 0x33221100, 0x77665544, 0x7A31": 0x77003311,
    "bfe.s32 r, 0xF00, 8, 4": 0xFFFFFFFF,
    "bfe.u32 r, 0xF00, 8, 4": 15,
    "bfi.b32 r, 5, 0xFFFFFFFF, 4, 4": 0xFFFFFF5F,
    "popc.b32 r, 0xF0F": 8,
    "clz.b32 r, 0x00010000": 15,
    "brev.b32 r, 1": 0x80000000,
    "min.s32 r, -1, 1": 0xFFFFFFFF,
    "min.u32 r, -1, 1": 1,
    "not.b32 r, 0": 0xFFFFFFFF,
    f"add.f32 r, {TINY}, {TINY}": 2,
    f"add.ftz.f32 r, {TINY}, {TINY}": 0,
    "mul.ftz.f32 r, 0f80800000, 0f3F000000": 0x80000000,  # a subnormal result keeps its sign
    f"fma.rn.f32 r, {TWO}, {THREE}, {ONE}": 0x40E00000,
    "fma.rm.f32 r, 0f3F800001, 0f3F800001, 0f00000000": 0x3F800002,
    "fma.rp.f32 r, 0f3F800001, 0f3F800001, 0f00000000": 0x3F800003,
    f"add.rz.f32 r, {ONE}, 0f33FFFFFF": 0x3F800000,
    f"add.rp.f32 r, {ONE}, 0f33000000": 0x3F800001,
    f"ex2.approx.ftz.f32 r, {THREE}": 0x41000000,
    f"rcp.approx.ftz.f32 r, {TWO}": 0x3F000000,
    "rcp.approx.ftz.f32 r, 0f80000000": 0xFF800000,
    "div.approx.ftz.f32 r, 0f3F800000, 0f7F000000": 0,  # divisors beyond 2^126
    f"div.rn.f32 r, {ONE}, {THREE}": 0x3EAAAAAB,
    f"min.f32 r, {NAN}, {TWO}": 0x40000000,
    f"max.NaN.f32 r, {NAN}, {TWO}": 0x7FC00000,
    "min.f32 r, 0f00000000, 0f80000000": 0x80000000,
    f"neg.f32 r, {TWO}": 0xC0000000,
    f"cvt.ftz.sat.f32.f32 r, {THREE}": 0x3F800000,
    f"cvt.sat.f32.f32 r, {NAN}": 0,
    "cvt.rni.s32.f32 r, 0f40200000": 2,  # 2.5 to even
    "cvt.rzi.s32.f32 r, 0fC0200000": 0xFFFFFFFE,
    "cvt.rzi.u32.f32 r, 0fC0200000": 0,
    f"cvt.rzi.s32.f32 r, {INF}": 0x7FFFFFFF,
    "cvt.rn.f32.s32 r, 16777217": 0x4B800000,
    "cvt.rp.f32.s32 r, 16777217": 0x4B800001,
    "cvt.s32.s8 r, 0x80": 0xFFFFFF80,
    "cvt.rn.f32.f64 r, 0d3FF0000010000000": 0x3F800000,  # a tie, to even
    "cvt.rn.bf16x2.f32 r, 0f3F808000, 0f3F818000": 0x3F803F82,
    "cvt.rn.f16x2.f32 r, 0f3F800000, 0f477FF000": 0x3C007C00,
    "fma.rn.bf16x2 r, 0x40003F80, 0x40404000, 0x3F800000": 0x40E04000,
    "mov.u32 r, %ntid.x": 32,
    "mov.b32 r, {1, 2}": 0x20001,
}


def test_single_instructions() -> None:
    lines = [f"{{\n.reg .b32 r;\n{text};\nst.global.b32 [%rd1+{4 * i}], r;\n}}" for i, text in enumerate(RESULTS)]
    out = torch.zeros(len(RESULTS), dtype=torch.int64).to(torch.int32)
    assert launch(kernel("\n".join(lines)), out) == ""
    found = dict(zip(RESULTS, (value & 0xFFFFFFFF for value in out.tolist()), strict=True))
    assert {text: hex(value) for text, value in found.items()} == {text: hex(value) for text, value in RESULTS.items()}


COMPARISONS = {
    f"setp.lt.f32 p, {ONE}, {NAN}": False,
    f"setp.ltu.f32 p, {ONE}, {NAN}": True,
    f"setp.ne.f32 p, {ONE}, {NAN}": False,
    f"setp.neu.f32 p, {ONE}, {NAN}": True,
    f"setp.num.f32 p, {ONE}, {NAN}": False,
    f"setp.eq.ftz.f32 p, {TINY}, 0f00000000": True,
    f"setp.eq.f32 p, {TINY}, 0f00000000": False,
    "setp.lo.u32 p, 1, -1": True,
    "setp.lt.s32 p, 1, -1": False,
    "setp.lt.and.s32 p, 1, 2, 0": False,
}


def test_comparisons_with_what_is_no_number() -> None:
    lines = [
        f"{{\n.reg .pred p;\n.reg .b32 r;\n{text};\nselp.u32 r, 1, 0, p;\nst.global.b32 [%rd1+{4 * i}], r;\n}}"
        for i, text in enumerate(COMPARISONS)
    ]
    out = torch.zeros(len(COMPARISONS), dtype=torch.int32)
    assert launch(kernel("\n".join(lines)), out) == ""
    assert dict(zip(COMPARISONS, out.bool().tolist(), strict=True)) == COMPARISONS


def test_lanes_of_a_warp_meet() -> None:
    """A shuffle downwards, which the last lane has no partner for, and a vote."""
    body = """
.reg .b32 %r<6>; .reg .pred %p<3>; .reg .b64 at;
mov.u32 %r1, %tid.x;
shfl.sync.down.b32 %r2|%p1, %r1, 1, 31, 0xffffffff;
setp.gt.u32 %p2, %r1, 29;
vote.sync.ballot.b32 %r3, %p2, 0xffffffff;
@!%p1 mov.u32 %r2, %r3;
mad.wide.u32 at, %r1, 4, %rd1;
st.global.u32 [at], %r2;
"""
    out = torch.zeros(32, dtype=torch.int32)
    assert launch(kernel(body), out) == ""
    assert out.tolist()[:31] == list(range(1, 32)) and out[31] & 0xFFFFFFFF == -(1 << 30)


WRONG = {
    # What a GPU would not forgive, or not say.
    "ld.global.v2.u32 {a, b}, [%rd1+4];": r"line \d+: 8 bytes of global memory at .*, which is not aligned",
    "ld.global.u32 a, [%rd1+128];": r"line \d+: 4 bytes of global memory at .*, which is in no tensor",
    "ld.shared.u32 a, [1024];": r"line \d+: shared memory at 0 that nobody has written",
    "ld.shared.u32 a, [1088];": r"line \d+: 4 bytes at 64 of 64 bytes of shared memory",
    "mbarrier.try_wait.parity.shared::cta.b64 p, [1024], 0;": r"nobody has written",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_accesses_end_the_launch(text: str) -> None:
    body = f".reg .b32 a, b; .reg .pred p;\n{text}\nst.global.u32 [%rd1], a;"
    assert re.search(WRONG[text], launch(kernel(body), torch.zeros(32, dtype=torch.int32), shared_bytes=64))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("frobnicate.b32 a, a;", r"line 8: an instruction that is not known: frobnicate.b32 a , a ;"),
        ("add.wrong.s32 a, a, a;", r"line 8: modifiers that are not known \(wrong\): add.wrong.s32"),
        ("add.s32 a, a, %clock;", r"line 8: an operand that is not known"),
        ("add.f64 a, a, a;", r"line 8: a_\d+ is b32, not f64"),
        ("add.s32 a, a;", r"line 8: 2 operands"),
        ("?", r"line 8: not PTX: '\?"),
    ],
)
def test_what_is_not_known_is_refused_with_line_and_text(text: str, why: str) -> None:
    with pytest.raises(PtxError, match=why):
        translate(parse(kernel(f".reg .b32 a; {text}")))


def small_shapes(regime: str, dtype: torch.dtype, install: Install) -> None:
    host = install(regime)
    for shape, window in (((2, 5, 7, 12), None), ((1, 6, 3, 8), 2), ((1, 1, 4, 4), None)):
        check_against_reference(make_inputs(shape, dtype=dtype), window=window)
    assert {launched.variant.regime for launched in host.launches} == {regime, "finish"}


def test_small_shapes(install: Install) -> None:
    small_shapes("long", torch.bfloat16, install)


def test_the_fused_forward_kernel() -> None:
    check(draw((2, 5, 7, 12), None, 4, 8, torch.bfloat16), window=3, host=PtxHost())


def test_a_barrier_left_out_shows(install: Install) -> None:
    """Without the barriers of the kernel over long lines threads read what others have not written yet."""
    install("long", SMALL, change=without_barriers)
    with pytest.raises(RuntimeError, match=r"line \d+: shared memory at \d+ that nobody has written"):
        check_against_reference(make_inputs((1, 21, 37, 8), dtype=torch.bfloat16))


def without_barriers(ptx: str) -> str:
    """PTX whose barriers of a block are gone."""
    return re.sub(r"(bar|barrier)(\.cta)?\.sync[^;]*;", "", ptx)


def wrong_phase(ptx: str) -> str:
    """PTX that waits for the other phase of each mbarrier."""
    pattern = r"(mbarrier\.try_wait\.parity[^;]*, )(%r\w+);"
    return re.sub(pattern, r"{ .reg .b32 other; xor.b32 other, \2, 1; \1other; }", ptx)


def one_byte_more(ptx: str) -> str:
    """PTX whose mbarriers expect a byte more than is sent."""
    pattern = r"(mbarrier\.arrive\.expect_tx[^;]*, )(\S+);"
    return re.sub(pattern, r"{ .reg .b32 more; add.s32 more, \2, 1; \1more; }", ptx)


def misaligned(ptx: str) -> str:
    """PTX whose first access of four bytes or more to global memory begins two bytes too late."""
    pattern = r"(ld\.global(?:\.\w+)*\.[buf](?:32|64) [^\[]*\[%rd\d+)(?:\+\d+)?\]"
    return re.sub(pattern, r"\1+2]", ptx, count=1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [without_barriers, wrong_phase, one_byte_more, misaligned])
def test_planted_faults_in_clusters_show(install: Install, fault: Callable[[str], str]) -> None:
    """One of three orders of the threads is enough."""

    def change(ptx: str) -> str:
        head, *kernels = ptx.split(".visible .entry ")
        kept = ".visible .entry ".join([head, *(text for text in kernels if "backward_kernel" not in text[:40])])
        return fault(kept)

    assert fault(example := cached_ptx(Variant("cluster", torch.bfloat16, 2, False), "compute_90")) != example
    inputs = make_inputs((1, 19, 35, 4), dtype=torch.bfloat16)
    expected = gspn_scan(*inputs, backend="reference")
    with pytest.raises((RuntimeError, AssertionError)):
        for schedule in range(3):
            install("cluster", change=change, schedule=schedule)
            torch.testing.assert_close(gspn_scan(*inputs, backend="cpu"), expected, rtol=0.03, atol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_regime_and_dtype(install: Install, regime: str, dtype: torch.dtype) -> None:
    """Windows, groups, directions, extreme logits, NaN where nothing reads, one module built for all of them."""
    small_shapes(regime, dtype, install)
    for shape, groups, window in (((1, 7, 9, 6), 3, 2), ((2, 5, 1, 5), 1, None), ((1, 16, 16, 12), 4, 7)):
        check_against_reference(make_inputs(shape, groups, dtype=dtype, merge=dtype), window=window)
    check_against_reference(make_inputs((1, 6, 5, 4), directions=2, dtype=dtype), ("up", "right"))
    inputs = make_inputs((1, 4, 6, 4), dtype=dtype)
    for magnitude in (120.0, 0.99 * torch.finfo(dtype).max):
        check_against_reference(inputs._replace(weight_logits=inputs.weight_logits.sign() * magnitude))
        check_against_reference(inputs._replace(weight_logits=torch.full_like(inputs.weight_logits, -magnitude)))
    unused_entries_reach_nothing(dtype)


def unused_entries_reach_nothing(dtype: torch.dtype) -> None:
    inputs = make_inputs((1, 4, 5, 4), dtype=dtype)
    logits = inputs.weight_logits.clone()
    logits[:, :, 0, 0] = logits[:, :, 4, 1] = logits[:, 0, :, 2] = logits[:, 3, :, 3] = math.nan  # first lines
    logits[:, 0, :, :2, 0] = logits[:, 3, :, :2, 2] = math.nan  # rows beside the image
    expected = scan_and_gradients(inputs._replace(weight_logits=logits.nan_to_num(0.0)), torch.ones_like(inputs.x))
    found = scan_and_gradients(inputs._replace(weight_logits=logits), torch.ones_like(inputs.x))
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["compute_80", "compute_90"])
def test_tiles_over_long_lines(install: Install, arch: str) -> None:
    """Threads beside a tile read what nobody wrote, NaN here, and none of it may reach a result."""
    for schedule in (0, 1):
        install("long", SMALL, arch=arch, schedule=schedule, unwritten_fails=False)
        check_against_reference(make_inputs((1, 19, 33, 16), 8, dtype=torch.bfloat16), window=11)
        check_against_reference(make_inputs((1, 21, 37, 8), dtype=torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_forward_with_groups_and_partial_tiles(dtype: torch.dtype) -> None:
    check(draw((2, 16, 16, 40), None, 4, 72, dtype), host=PtxHost())
    check(draw((1, 9, 20, 16), 2, 2, 5, dtype, skip=False), codes=(3, 0), host=PtxHost())
    tensors = draw((1, 4, 33, 5), 1, 4, 3, dtype)
    for schedule in (0, 1):
        check(tensors, host=PtxHost(schedule=schedule))


@pytest.mark.slow
@pytest.mark.parametrize("cut", [(2, 1), (1, 2)])
def test_fused_backward_in_clusters_and_without(cut: tuple[int, int]) -> None:
    tensors = draw((2, 5, 7, 12), 6, 4, 24, torch.bfloat16)
    for schedule in (0, 1):
        check_backward(tensors, window=3, host=PtxHost(schedule=schedule), cut=cut)


@pytest.mark.slow
def test_a_barrier_left_out_of_the_fused_backward_kernel_shows() -> None:
    tensors = draw((1, 5, 6, 16), None, 4, 24, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"line \d+: shared memory at \d+ that nobody has written"):
        check_backward(tensors, host=PtxHost(change=without_barriers), cut=(1, 1))
