"""Reading disassembled kernels: loops, counts and classes of instructions."""

from __future__ import annotations

import re
import struct

import pytest

from bench.offline.disassembly import (
    block_loops,
    class_of,
    code_hash,
    counts_of,
    instructions_of,
    macs_of,
    number_of,
)

SASS = """
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
                                                                 /* 0x000e300000000800 */
        /*0010*/              @!P0 BRA 0x00d0 ;                  /* 0x000 */
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E R9, [R2.64] ;
        /*0040*/                   ISETP.NE.AND P1, PT, R0, RZ, PT ;
        /*0050*/               @P1 BRA 0x0040 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
        /*0080*/                   BRA.U !UP0, 0x0070 ;
        /*0090*/                   MUFU.EX2 R5, R4 ;
        /*00a0*/               @P4 CALL.REL.NOINC 0x00c0 ;
        /*00b0*/                   BRA 0x0020 ;
        /*00c0*/                   NOP ;
        /*00d0*/                   STG.E.64 [R2.64], R4 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0x00f0;
"""


def test_loops_of_a_listing() -> None:
    loops = block_loops(instructions_of(SASS))
    assert loops[0].kind == "block"
    assert sorted(loop.kind for loop in loops) == ["block", "search", "window"]
    own = {loop.kind: loop for loop in loops}
    block = {"LDG.128": 1, "LDG.32": 1, "HMMA": 1, "MUFU.EX2": 1, "CONTROL": 2}
    assert own["block"].counts == block
    assert own["block"].macs == {"HMMA.BF16": 2048}
    assert own["window"].counts == {"HMMA": 1, "CONTROL": 1}
    assert own["window"].macs == {"HMMA.TF32": 1024}
    assert own["search"].counts == {"ALU": 1, "CONTROL": 1}


def test_counts_of_a_listing() -> None:
    counts = counts_of(instructions_of(SASS))
    assert counts["CONTROL"] == 7
    assert counts["STG.64"] == 1
    assert number_of(counts, "LDG") == 2
    assert "NOP" not in str(counts)


def test_without_matrix_and_special_instructions_there_is_no_loop_over_blocks() -> None:
    without = SASS.replace("HMMA", "FFMA")
    assert block_loops(instructions_of(without))[0].kind == "block"
    assert block_loops(instructions_of(without.replace("MUFU", "FADD"))) == []


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("LDG.E.128.CONSTANT", "LDG.128"),
        ("LDG.E", "LDG.32"),
        ("STS.U16", "STS.16"),
        ("LDSM.16.MT88.4", "LDSM.128"),
        ("STSM.16.M88", "STSM.32"),
        ("REDG.E.ADD.F32.FTZ.RN.STRONG.GPU", "RED.32"),
        ("RED.E.ADD.F32x4.RN.STRONG.GPU", "RED.128"),
        ("STL.64", "STL.64"),
        ("UTCHMMA", "UTCMMA"),
        ("UTCQMMA.2CTA", "UTCMMA"),
        ("MUFU.RCP", "MUFU.RCP"),
        ("UIADD3", "UNIFORM"),
        ("IMAD.MOV.U32", "IMAD"),
        ("FMNMX", "ALU"),
        ("BAR.SYNC.DEFER_BLOCKING", "BAR"),
    ],
)
def test_classes(name: str, found: str) -> None:
    assert class_of(name) == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("HMMA.16816.F32.BF16", ("HMMA.BF16", 16 * 8 * 16)),
        ("HMMA.16816.F32", ("HMMA.F16", 16 * 8 * 16)),
        ("HMMA.1688.F32.TF32", ("HMMA.TF32", 16 * 8 * 8)),
        ("HMMA.1684.F32.TF32", ("HMMA.TF32", 16 * 8 * 4)),
        ("HGMMA.64x128x16.F32.BF16", ("HGMMA.BF16", 64 * 128 * 16 // 4)),
        ("UTCHMMA", None),
        ("FFMA", None),
    ],
)
def test_multiply_adds(name: str, found: tuple[str, int] | None) -> None:
    assert macs_of(name) == found


def test_an_unknown_shape_is_told() -> None:
    with pytest.raises(ValueError, match="a shape not known"):
        macs_of("HMMA.884.F32.F32")


def elf(*sections: tuple[int, int, bytes]) -> bytes:
    """A file with sections of these types, flags and contents."""
    head, body, table = 64, b"", b""
    for kind, flags, content in sections:
        at = head + len(body)
        table += struct.pack("<IIQQQQIIQQ", 0, kind, flags, 0, at, len(content), 0, 0, 1, 0)
        body += content
    start = head + len(body)
    fields = (2, 190, 1, 0, 0, start, 0, 64, 0, 0, 64, len(sections), 0)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    return ident + struct.pack("<HHIQQQIHHHHHH", *fields) + body + table


CODE, DEBUG = (1, 6, b"code"), (1, 0, b"/home/me/kernel.py")


def test_the_hash_is_that_of_the_code_alone() -> None:
    here = code_hash(elf(DEBUG, CODE))
    assert re.fullmatch("[0-9a-f]{16}", here)
    assert here == code_hash(elf(CODE, (1, 0, b"/home/you/kernel.py")))
    assert here != code_hash(elf(DEBUG, (1, 6, b"cods")))
    assert here != code_hash(elf(DEBUG, CODE, CODE))


@pytest.mark.parametrize("wrong", [b"", b"PK\x03\x04", b"\x7fELF\x01", elf(DEBUG)])
def test_what_is_no_machine_code_raises(wrong: bytes) -> None:
    with pytest.raises(ValueError, match=r"^cubin: "):
        code_hash(wrong)
