"""The check of machine code: registers of asynchronous products touched before their wait."""

from __future__ import annotations

import pytest

from bench.offline.disassembly import instructions_of
from bench.offline.hazards import hazards

WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
# A in R4 to R7, D in R24 to R55
PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0"


def listing(*lines: str) -> str:
    return "\n".join(f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines))


def found(*lines: str) -> list[str]:
    return hazards(instructions_of(listing(*lines, "EXIT")))


@pytest.mark.parametrize(
    "line",
    [
        "MOV R4, R60",
        "MOV R7, R60",
        "@P0 FADD R5, R60, R61",
        "@!P3 IMAD.MOV.U32 R6, RZ, RZ, R10",
        "LDS.64 R6, [R60]",
        "LDG.E.128 R4, desc[UR4][R60.64]",
        "LDG.E.64.CONSTANT R6, desc[UR4][R60.64]",
        "LDL.LU.64 R6, [R1+0x288]",
        "LDSM.16.M88.4 R4, [R60]",
        "LDSM.16.MT88.2 R6, [R60+UR4]",
        "IMAD.WIDE R6, R60, 0x4, R62",
        "IMAD.WIDE R3, R60, 0x4, R62",  # its second register
        "LDS.128 R1, [R60]",  # its last
        "CS2R R6, SRZ",
        "HMMA.16816.F32.BF16 R4, R60, R64, R68",
        "SHFL.BFLY PT, R5, R60, 0x1, 0x1f",
        "LOP3.LUT P0, R5, R60, 0x1, RZ, 0xc0, !PT",
        "IADD3 R4, P0, P1, R60, R61, RZ",
        "I2F.F64 R6, R60",
        "DADD R6, R60, R62",
        "BMOV.32.CLEAR R5, B0",
        "ATOMG.E.ADD.64.STRONG.GPU PT, R6, desc[UR4][R60.64], R62",
    ],
)
def test_a_write_to_a_is_found(line: str) -> None:
    (text,) = found(PRODUCT, line, WAIT)
    name = line.split()[1 if line.startswith("@") else 0]
    assert text.startswith(f"{name} at 0x0010 writes R")
    assert text.endswith(", A of HGMMA.64x64x16.F32.BF16 at 0x0000")
    assert found(PRODUCT, WAIT, line) == []


@pytest.mark.parametrize(
    "line",
    [
        "MOV R8, R4",
        "STS.128 [R60], R4",
        "STG.E desc[UR4][R4.64], R60",
        "ISETP.NE.AND P1, PT, R4, RZ, PT",
        "FSETP.GT.AND P1, PT, R4, R5, PT",
        "UMOV UR4, URZ",
        "R2UR UR5, R4",
        "LDS R8, [R4]",
        "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R60.64]",
        "LOP3.LUT P0, RZ, R4, 0x1, RZ, 0xc0, !PT",
        "FCHK P0, R4, R5",
        "CS2R.32 R3, SR_CLOCKLO",
        "F2F.F32.F64 R3, R60",
        "RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R4.64], R60",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4], R5",
        "WARPGROUP.ARRIVE",
        "BAR.SYNC.DEFER_BLOCKING R4, R5",
        "WARPSYNC R4",
        "BMOV.32 B0, R4",
        "LDL.64 R2, [R1]",
    ],
)
def test_what_reads_a_or_writes_beside_it_is_not(line: str) -> None:
    assert found(PRODUCT, line, WAIT) == []


@pytest.mark.parametrize(
    ("line", "verb"),
    [
        ("FADD R60, R61, R24", "reads R24"),
        ("FADD R60, -R55.reuse, |R61|", "reads R55"),
        ("FADD R30, R60, R61", "writes R30"),
        ("STS [R60], R40", "reads R40"),
        ("FFMA R24, R24, R60, R61", "writes R24"),
        ("LDG.E.128 R22, desc[UR4][R60.64]", "writes R24"),
    ],
)
def test_d_is_neither_read_nor_written(line: str, verb: str) -> None:
    texts = found(PRODUCT, line, WAIT)
    assert any(f"{verb}, D of HGMMA" in text for text in texts)
    assert found(PRODUCT, WAIT, line) == []


def test_products_among_themselves() -> None:
    chained = PRODUCT.replace("R4,", "R8,")
    assert found(PRODUCT, chained, WAIT) == []
    # D over A, A of D, D shifted
    narrow = "HGMMA.64x16x16.F32.BF16 R0, R60, gdesc[UR8], R0, gsb0"
    (over,) = found(PRODUCT, narrow, WAIT)
    assert "writes R4, A of" in over
    (of_d,) = found(PRODUCT, PRODUCT.replace("R24", "R64").replace("R4,", "R52,"), WAIT)
    assert "reads R52, D of" in of_d
    (shifted,) = found(PRODUCT, PRODUCT.replace("R24", "R40").replace("R4,", "R8,"), WAIT)
    assert "writes R40, D of" in shifted
    # two groups apart
    apart = PRODUCT.replace("R24", "R64").replace("R4,", "R8,")
    assert found(PRODUCT, apart, WAIT) == []


def test_a_in_shared_memory_has_no_registers() -> None:
    shared = PRODUCT.replace("R4,", "gdesc[UR4],")
    assert found(shared, "MOV R4, R60", WAIT) == []
    assert found(shared, "MOV R24, R60", WAIT) != []


@pytest.mark.parametrize(
    ("product", "last"),
    [
        ("HGMMA.64x16x16.F32 R24, R4, gdesc[UR8], R24, gsb0", 31),
        ("HGMMA.64x128x8.F32.TF32 R24, R4, gdesc[UR8], RZ, !UPT, gsb0", 87),
        ("HGMMA.64x64x16.F16 R24, R4, gdesc[UR8], R24, gsb0", 39),
    ],
)
def test_d_is_as_wide_as_the_product(product: str, last: int) -> None:
    assert found(product, f"MOV R{last}, RZ", WAIT) != []
    assert found(product, f"MOV R{last + 1}, RZ", WAIT) == []


def test_waits_count_groups() -> None:
    first = [PRODUCT.replace(", gsb0", ""), PRODUCT.replace("R4,", "R8,")]
    second = [line.replace("R24", "R64") for line in first]
    second = [line.replace("R4,", "R12,").replace("R8,", "R16,") for line in second]
    one_left = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert found(*first, *second, one_left, "MOV R4, RZ", "MOV R8, RZ", WAIT) == []
    assert len(found(*first, *second, one_left, "MOV R12, RZ", "MOV R16, RZ", WAIT)) == 2
    # a group that is still open is not waited for
    assert len(found(first[0], WAIT, "MOV R4, RZ", first[1], WAIT)) == 1


def test_a_wait_that_may_be_skipped_does_not_count() -> None:
    assert found(PRODUCT, f"@P0 {WAIT}", "MOV R4, RZ", WAIT) != []
    assert found(PRODUCT, "@P0 BRA 0x0030", WAIT, "MOV R4, RZ") != []
    assert found(PRODUCT, "@P0 BRA 0x0040", WAIT, "MOV R4, RZ", WAIT) == []


def test_ways_back_are_followed() -> None:
    """The product of one turn, the write of the next."""
    loop = ("MOV R4, R60", PRODUCT, "ISETP.NE.AND P0, PT, R60, RZ, PT", "@P0 BRA 0x0000")
    (text,) = found(*loop, WAIT)
    assert text.startswith("MOV at 0x0000 writes R4")
    assert found(*loop[:2], WAIT, *loop[2:]) == []
    # one group stays under way over the way back: right with two sets of registers
    turn = (
        "MOV R4, R60", PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "MOV R8, R60", PRODUCT.replace("R4,", "R8,"), "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "@P0 BRA 0x0000", WAIT,
    )  # fmt: skip
    assert found(*turn) == []
    assert found(*(line.replace("R8", "R4") for line in turn)) != []


def test_code_without_products_has_none() -> None:
    assert found("MOV R4, RZ", "HMMA.16816.F32.BF16 R4, R8, R12, R4") == []
