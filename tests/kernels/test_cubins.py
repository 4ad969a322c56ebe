"""Every kernel of every family, compiled for every architecture without a GPU."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import INTERPRET, compile_for, triton

from gradnorm_kernels import kernels

MODULES = [
    importlib.import_module(f"{kernels.__name__}.{module.name}")
    for module in pkgutil.iter_modules(kernels.__path__)
]
CAPABILITIES = (80, 90, 100, 120)
# Of a family that lists more than this, most are marked slow.
FEW = 24


def cases() -> Iterator[Any]:
    for module in MODULES:
        specializations = list(getattr(module, "specializations", tuple)())
        for specialization, capability in itertools.product(specializations, CAPABILITIES):
            usual = {"*fp16", "*fp64"}.isdisjoint(specialization.signature.values()) and capability == 90
            marks = () if usual or len(specializations) <= FEW else (pytest.mark.slow,)
            yield pytest.param(
                specialization, capability, id=f"{specialization.name}-sm_{capability}", marks=marks
            )


def assert_128_bit_accesses(ptx: str, reads: int, writes: int) -> None:
    # A 128-bit vector is v4.b32 or v2.b64; Blackwell also has 256 bits.
    wide = {"v4.b32", "v2.b64", "v8.b32", "v4.b64"}
    for instruction, arrays in (("ld", reads), ("st", writes)):
        accesses = re.findall(rf"\b{instruction}\.global\S*", ptx)
        assert len(accesses) >= arrays
        narrow = [a for a in accesses if ".".join(a.split(".")[-2:]) not in wide]
        assert not narrow, f"narrower than 128 bits: {narrow}"


@pytest.mark.parametrize(("specialization", "capability"), [] if INTERPRET else list(cases()))
def test_compiles_without_spills(specialization: Any, capability: int, tmp_path: Path) -> None:
    compiled = compile_for(specialization, capability)
    assert compiled.metadata.enable_fp_fusion
    if specialization.wide_accesses:
        assert_128_bit_accesses(compiled.asm["ptx"], *specialization.wide_accesses)

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    # ptxas spills registers to the stack, and nothing else in these kernels would use it.
    assert re.search(r"REG:\d+ STACK:0 .*LOCAL:0\b", usage), usage
