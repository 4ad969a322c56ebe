"""What ptxas made of the Triton kernels, read from their machine code. No GPU is needed.

    python -m benchmarks.sass [--kernel layer_norm_bwd_bwd] [--case swin] [--dtype bfloat16] [--arch 80 90]

The launches are those that the compile tests of each family make (`calls` in tests/kernels), as the launchers
choose them for a GPU of each architecture. Triton compiles them and brings the disassembler.

Instructions are those of a thread, counted where a program spends its time: in its loops, each once, if they
are most of the code, else everywhere. An element's are of as many threads as share it, over the elements of a
tile, with its padding. (The elements of attention are scores.) How often an instruction is executed, and how
long one waits, is not in machine code: counts compare versions of a kernel, they do not give its time.
"""

import argparse
import importlib
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradnorm_kernels.kernels import FAMILIES

from .measure import Columns, describe_machine, heading, line, write_json

TESTS = Path(__file__).parents[1] / "tests"
# The constants whose product is a tile's elements: the first of these that a kernel has.
TILES = (
    ("row_block", "key_block"),
    ("block_rows", "block_columns"),
    ("block_rows", "block_cols"),
    ("block_parts", "block_columns"),
    ("block_size",),
    ("shape",),
    ("block",),
    ("rows", "columns"),
)

# KiB of shared memory and warps of an SM: table "Technical Specifications per Compute Capability" of the CUDA
# C++ Programming Guide. Each program takes 1 KiB besides its own; registers, 65,536 of an SM, are given to a
# warp in units of 256.
SHARED_MEMORY = {75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
WARPS = {75: 32, 80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}

COLUMNS: Columns = {
    "kernel": ("kernel", "28"),
    "case": ("case", "18"),
    "dtype": ("dtype", "8"),
    "sm": ("arch", "4"),
    "an element": ("instructions_an_element", "10.1f"),
    "all": ("instructions", "6"),
    "ffma": ("ffma", "5"),
    "mma": ("mma", "4"),
    "barriers": ("barriers", "8"),
    "accesses": ("accesses", "8"),
    "of 128": ("wide_accesses", "6"),
    "regs": ("registers", "5"),
    "stack": ("stack", "6"),
    "shared": ("shared", "7"),
    "warps": ("warps", "5"),
    "SM by regs": ("programs_by_registers", "10"),
    "by shared": ("programs_by_shared_memory", "9"),
}


def harness() -> Any:
    """That of the compile tests, which knows how launches are captured."""
    for folder in (TESTS / "kernels", TESTS):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module("harness")


def counted(sass: str) -> dict[str, int]:
    """Instructions in cuobjdump's listing of one kernel: all, and by kind those where time is spent."""
    code = {int(at, 16): text for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) *;", sass)}
    looped: set[int] = set()
    for at, text in code.items():
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)$", text)
        # After its end a kernel has a branch to itself.
        if target and (start := int(target[1], 16)) < at:
            looped.update(place for place in code if start <= place <= at)
    counts = {"instructions": len(code)}
    spent = [code[place] for place in (looped if 2 * len(looped) > len(code) else code)]
    # After a predicate.
    operations = [re.sub(r"^@\S+\s+", "", text).split()[0] for text in spent]
    for kind, pattern in (
        ("counted", ""),
        ("ffma", "FFMA"),
        ("mma", r"(?!HFMA)\w*MMA\b"),
        ("barriers", r"BAR\b"),
        ("accesses", r"(LDG|STG|LDGSTS)\b"),
        ("wide_accesses", r"(LDG|STG|LDGSTS)\b.*\.(ENL2\.256|128)\b"),
    ):
        counts[kind] = sum(re.match(pattern, operation) is not None for operation in operations)
    return counts


def measured(launch: Any, arch: int) -> dict[str, int | float]:
    """One launch, compiled for an architecture."""
    compiled = launch.compiled(arch)
    cuobjdump = importlib.import_module("triton").knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [cuobjdump, "-sass", "--dump-resource-usage", cubin.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", listing).groups())
    counts = counted(listing)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    names = {launch.kernel.arg_names[path[0]]: value for path, value in launch.constants.items()}
    elements = 1
    for name in next(tile for tile in TILES if all(name in names for name in tile)):
        elements *= math.prod(names[name]) if name == "shape" else names[name]
    return {
        "instructions_an_element": counts.pop("counted") * 32 * warps / elements,
        **counts,
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "warps": warps,
        "programs_by_registers": min(65536 // (-(-registers // 8) * 256 * warps), WARPS[arch] // warps),
        "programs_by_shared_memory": SHARED_MEMORY[arch] * 1024 // (shared + 1024),
    }


def table(
    archs: list[int], kernels: list[str], cases: list[str], dtypes: list[str]
) -> Iterator[dict[str, Any]]:
    """A row for each distinct launch whose kernel, case and dtype match one of the patterns of each kind."""
    capture = harness()
    for family in FAMILIES:
        for dtype in capture.DTYPES:
            if str(dtype)[6:] not in dtypes:
                continue
            seen: list[Any] = []
            for name, *call in importlib.import_module(f"test_{family}_kernels").calls(dtype):
                if not any(re.search(case, name) for case in cases):
                    continue
                for arch in archs:
                    for launch in capture.recorded_on(arch, *call):
                        kernel = launch.kernel.__name__.removesuffix("_kernel")
                        if (arch, launch) in seen or not any(re.search(k, kernel) for k in kernels):
                            continue
                        seen.append((arch, launch))
                        of = {"kernel": kernel, "case": name, "dtype": str(dtype)[6:], "arch": arch}
                        yield of | measured(launch, arch)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=WARPS, help="90 is sm_90")
    parser.add_argument("--kernel", nargs="+", default=[""], metavar="PATTERN", help="of kernels' names")
    parser.add_argument("--case", nargs="+", default=[""], metavar="PATTERN", help="of cases' names")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args(arguments)
    print(heading(COLUMNS))
    rows = []
    for row in table(args.arch, args.kernel, args.case, args.dtype):
        print(line(COLUMNS, row), flush=True)
        rows.append(row)
    if args.json:
        write_json(args.json, machine=describe_machine("cpu"), rows=rows)


if __name__ == "__main__":
    main()
