"""What a compiled kernel issues, read from its machine code: size, and instructions per line of a scan by kind."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gspn_dit.ops.cuda.types import Variant

INSTRUCTION_BYTES = 16  # from compute capability 7.0 on
_KINDS = {
    "global": ("LDG", "STG"),
    "generic": ("LD", "ST"),
    "shared": ("LDS", "STS", "STAS", "SHFL"),
    "special": ("MUFU",),
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "F2FP", "F2F", "DADD", "DMUL", "DFMA", "DSETP"),
}


@dataclass(frozen=True)
class Code:
    """One kernel's code."""

    bytes: int
    instructions: dict[str, float]
    """A warp's instructions for one line of a walk there and, in a backward kernel, back: by kind, "other" the rest."""
    steps: int
    """Barriers that one line passes in all walks of the kernel, 0 in a kernel that walks none."""


def disassembler() -> str | None:
    """Path of nvdisasm, the toolkit's or the one that Triton brings, or None."""
    found = shutil.which("nvdisasm")
    if found is None and (spec := importlib.util.find_spec("triton")) is not None and spec.origin is not None:
        brought = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(brought) if brought.exists() else None
    return found


def read_code(cubin: bytes, variant: Variant) -> dict[str, Code]:
    """Return the code of each kernel in a cubin; raises RuntimeError where nvdisasm cannot read it or is missing."""
    path = disassembler()
    if path is None:
        raise RuntimeError("nvdisasm is not installed: pip install triton, or the CUDA toolkit")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([path, "-c", file.name], capture_output=True, text=True, encoding="utf-8")
    if done.returncode != 0:
        raise RuntimeError(f"nvdisasm: {done.stderr.strip()}")
    parts = re.split(r"^\.text\.(\w+):$", done.stdout, flags=re.MULTILINE)
    return {name: _code(text, variant) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _code(text: str, variant: Variant) -> Code:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1].strip())
    total: dict[str, float] = {}
    steps = 0
    for first, last, barriers in _line_loops(instructions, labels):
        # Unrolled backward loops pass two barriers per line: one there, one back.
        both = variant.backward and variant.regime in ("short", "cluster") and barriers >= 2 * variant.lines
        steps += 2 if both else 1
        for name in map(_kind, instructions[first : last + 1]):
            total[name] = total.get(name, 0.0) + 1 / (barriers // 2 if both else barriers)
    counts = {kind: round(count, 2) for kind, count in total.items()}
    return Code(len(instructions) * INSTRUCTION_BYTES, counts, steps)


def _line_loops(instructions: list[str], labels: dict[str, int]) -> list[tuple[int, int, int]]:
    """First and last instruction and barriers of each innermost loop that has barriers: those walk lines."""
    # What follows the end of a kernel is waiting, which jumps back into it.
    end = instructions.index("EXIT")
    loops = []
    for last, instruction in enumerate(instructions[:end]):
        target = re.search(r"BRA.*`\((\.L_\w+)\)", instruction)
        if target and (first := labels.get(target[1], end)) <= last:
            barriers = sum("BAR.SYNC" in text for text in instructions[first : last + 1])
            if barriers:
                loops.append((first, last, barriers))
    return [loop for loop in loops if not any(o is not loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]


def _kind(instruction: str) -> str:
    name = re.sub(r"^@!?U?P\w+ ", "", instruction).split()[0].split(".")[0]
    return next((kind for kind, names in _KINDS.items() if name in names), "other")
