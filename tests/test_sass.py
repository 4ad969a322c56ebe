"""benchmarks/sass.py: that it counts what is in machine code."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)
sys.path.append(str(ROOT))
from benchmarks import sass  # noqa: E402

LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;    /* 0x00000a00ff017b82 */
                                                             /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.128 R4, [R2] ;      /* 0x0000000402047981 */
        /*0020*/              @!P0 LDG.E R8, [R2.64] ;       /* 0x0000000402047981 */
        /*0030*/                   FFMA R4, R4, R5, R6 ;     /* 0x0000000402047981 */
        /*0040*/                   HFMA2.MMA R7, -RZ, 0 ;    /* 0x0000000402047981 */
        /*0050*/                   HMMA.16816.F32 R8, R4 ;   /* 0x0000000402047981 */
        /*0060*/                   BAR.SYNC 0x0 ;            /* 0x0000000402047981 */
        /*0070*/               @P0 BRA 0x10 ;                /* 0x0000000402047981 */
        /*0080*/                   BAR.SYNC 0x0 ;            /* 0x0000000402047981 */
        /*0090*/                   BRA 0x90 ;                /* 0x0000000402047981 */
"""


def test_the_loop_is_counted():
    assert sass.counted(LISTING) == {
        **{"instructions": 10, "counted": 7, "ffma": 1, "mma": 1},
        **{"barriers": 1, "accesses": 2, "wide_accesses": 1},
    }
    straight = sass.counted(LISTING.replace("BRA 0x10 ", "BRA 0x80 "))
    assert straight["counted"] == 10 and straight["barriers"] == 2


def test_layer_norms_double_backward(monkeypatch):
    """A row of at most 512 columns is in one warp, whose sums wait for no other's."""
    monkeypatch.setattr(sass, "FAMILIES", ["layer_norm"])
    long, *short = sass.table([90], ["layer_norm_bwd_bwd"], ["^vit$", "^swin28$", "^swin14$"], ["float32"])
    assert long["barriers"] > 0 and len(short) == 2
    assert 20 < long["instructions_an_element"] < 300
    for row in short:
        assert row["barriers"] == 0 and 20 < row["instructions_an_element"] <= 45
    for row in (long, *short):
        assert row["stack"] == 0 and row["wide_accesses"] >= 5
