"""Reads a compiled kernel: hashes its code, counts its instructions, finds the loop over blocks.

Works on cubins and on text, and does not import Triton.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_LINE = re.compile(
    r"^\s*/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<when>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*);",
    re.MULTILINE,
)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_ENDS = ("EXIT", "RET")
_JUMPS = ("BRA", "CALL", "JMP")  # far jumps may be written as calls that never return
_SIZED = ("LDG", "STG", "LDS", "STS", "LDL", "STL", "RED", "ATOM", "ATOMG", "ATOMS", "LDSM", "STSM")
_BY_NAME = ("HMMA", "HGMMA", "FFMA", "FADD", "FMUL", "SHFL", "REDUX", "IMAD", "BAR", "LDC")
_CONVERSIONS = ("I2F", "F2I", "F2F", "I2I", "FRND", "POPC", "FLO", "BREV")
_CONTROL = (
    "BRA", "CALL", "JMP", "EXIT", "RET", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "DEPBAR",
    "LDGDEPBAR", "WARPGROUP", "MEMBAR", "FENCE", "ERRBAR", "ELECT", "SYNCS", "NANOSLEEP", "YIELD",
    "BPT", "CCTL", "S2R", "S2UR",
)  # fmt: skip
_HASH_DIGITS = 16


class Instruction(NamedTuple):
    """One line of SASS.

    Attributes
    ----------
    at : its address
    conditional : whether it has a predicate
    name : with its modifiers
    target : the address it may jump to; None if it is no jump
    operands : those after the name
    """

    at: int
    conditional: bool
    name: str
    target: int | None
    operands: tuple[str, ...] = ()


class Flow(NamedTuple):
    """Basic blocks: numbers of their first instructions, their ends, the successors of each."""

    starts: list[int]
    ends: list[int]
    successors: list[list[int]]


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop, for each warp, without those of the loops in it.

    Attributes
    ----------
    kind : "block" (over blocks of edges), "window" (in it, with matrix instructions of its own:
        over the rows of a block), "wait" (polls a barrier), "search" (another one)
    counts : instructions by class
    macs : multiply-adds of the matrix instructions, by instruction and type
    """

    kind: str
    counts: dict[str, int]
    macs: dict[str, int]


def instructions_of(sass: str) -> list[Instruction]:
    """The lines of ``cuobjdump --dump-sass``, without NOP."""
    found = []
    for line in _LINE.finditer(sass):
        name, rest = line["name"], line["rest"]
        if name == "NOP":
            continue
        jumps = name.split(".")[0] in _JUMPS
        goes = _TARGET.search(rest) if jumps else None
        # BRA.U has its condition among the operands
        conditional = line["when"] is not None or (jumps and "UP" in rest)
        target = int(goes[1], 16) if goes else None
        operands = tuple(operand.strip() for operand in rest.split(",") if operand.strip())
        found.append(Instruction(int(line["at"], 16), conditional, name, target, operands))
    return found


def class_of(name: str) -> str:
    """The class of an instruction: LDG.128, MUFU.EX2, HMMA, ...; ALU for the rest."""
    base, *modifiers = name.split(".")
    if base == "MUFU":
        return f"MUFU.{modifiers[0]}"
    if base in ("REDG", "REDS"):
        base = "RED"
    if base in _SIZED:
        return f"{base}.{_bits(base, modifiers)}"
    if base in _BY_NAME:
        return base
    if re.fullmatch(r"(UTC\w*MMA|QGMMA)", base):
        return "UTCMMA" if base.startswith("UTC") else base
    if re.fullmatch(r"(HFMA2|HADD2|HMUL2|FHADD|FHFMA|FFMA2|FADD2|FMUL2)", base):
        return "PACKED"
    if base in ("LDTM", "STTM"):
        return "TMEM"
    if base in _CONVERSIONS:
        return "CONVERT"
    if base in _CONTROL:
        return "CONTROL"
    if base.startswith(("U", "R2UR", "VOTEU", "LDCU")):
        return "UNIFORM"
    return "ALU"


def _bits(base: str, modifiers: list[str]) -> int:
    """How many bits an access moves for each lane."""
    if base in ("LDSM", "STSM"):
        return 32 * (int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1)
    for modifier in modifiers:
        if vector := re.fullmatch(r"F32x([248])", modifier):
            return 32 * int(vector[1])
        if sized := re.fullmatch(r"[US]?(8|16|32|64|128|256)", modifier):
            return int(sized[1])
    return 32


def macs_of(name: str) -> tuple[str, int] | None:
    """``("HMMA.BF16", 2048)``: the multiply-adds that one warp's matrix instruction does.

    HGMMA is one product of four warps, each of which issues it: a quarter of it for each. None
    for other instructions, and for UTC*MMA, whose name does not tell its size.
    """
    base, *modifiers = name.split(".")
    if base not in ("HMMA", "HGMMA"):
        return None
    if base == "HGMMA":
        m, n, k = (int(size) for size in modifiers[0].split("x"))
        macs = m * n * k // 4
    else:
        shape = re.fullmatch(r"16(8)(4|8|16)", modifiers[0])
        if shape is None:
            raise ValueError(f"{name}: a shape not known")
        macs = 16 * int(shape[1]) * int(shape[2])
    kinds = [m for m in modifiers[1:] if m in ("BF16", "TF32")]
    return f"{base}.{kinds[0] if kinds else 'F16'}", macs


def counts_of(instructions: Iterable[Instruction]) -> dict[str, int]:
    """How many of each class."""
    return dict(sorted(Counter(class_of(i.name) for i in instructions).items()))


def macs_by_type(instructions: Iterable[Instruction]) -> dict[str, int]:
    """Sums of :func:`macs_of`."""
    total: Counter[str] = Counter()
    for instruction in instructions:
        if found := macs_of(instruction.name):
            total[found[0]] += found[1]
    return dict(total)


def number_of(counts: Mapping[str, int], *bases: str) -> int:
    """How many instructions of these names, whatever their width or kind."""
    return sum(n for name, n in counts.items() if name.split(".")[0] in bases)


def block_loops(instructions: list[Instruction]) -> list[Loop]:
    """The loop over blocks and those inside it, outermost first.

    It is the outermost loop with matrix instructions or, in a stage without products, with
    instructions of the special function units. A kernel without either has none.
    """
    loops = _natural_loops(instructions)

    def has_matrix(body: Iterable[int]) -> bool:
        counts = counts_of(instructions[i] for i in body)
        return number_of(counts, "HMMA", "HGMMA", "UTCMMA", "QGMMA") > 0

    def has_special(body: Iterable[int]) -> bool:
        return any(instructions[i].name.startswith("MUFU") for i in body)

    working = [body for body in loops if has_matrix(body) or has_special(body)]
    if not working:
        return []
    outer = max(working, key=len)
    inner = sorted((body for body in loops if body < outer), key=len, reverse=True)
    found = []
    for body in (outer, *inner):
        own = body.difference(*(other for other in inner if other < body))
        mine = [instructions[i] for i in sorted(own)]
        if body is outer:
            kind = "block"
        elif has_matrix(body):
            kind = "window"
        else:
            kind = "wait" if any(i.name.startswith("SYNCS") for i in mine) else "search"
        found.append(Loop(kind, counts_of(mine), macs_by_type(mine)))
    return found


def flow_of(instructions: list[Instruction]) -> Flow:
    """The flow graph."""
    place = {instruction.at: i for i, instruction in enumerate(instructions)}
    at = sorted(place)

    def first_at(address: int) -> int:
        # a jump may lead to a NOP, which is not listed
        return place[min((a for a in at if a >= address), default=at[-1])]

    def leads_to(i: int) -> Iterator[int]:
        instruction = instructions[i]
        base = instruction.name.split(".")[0]
        if instruction.target is not None:
            yield first_at(instruction.target)
        ends = base in _ENDS or (base in ("BRA", "JMP") and instruction.target is not None)
        if (instruction.conditional or not ends) and i + 1 < len(instructions):
            yield i + 1

    jumps = [i for i in range(len(instructions)) if instructions[i].name.split(".")[0] in _JUMPS]
    starts = {0} | {i + 1 for i in jumps} | {n for i in jumps for n in leads_to(i)}
    starts |= {i + 1 for i, line in enumerate(instructions) if line.name.split(".")[0] in _ENDS}
    leaders = sorted(start for start in starts if start < len(instructions))
    number = {start: n for n, start in enumerate(leaders)}
    bounds = [*leaders[1:], len(instructions)]
    successors = [[number[n] for n in leads_to(end - 1)] for end in bounds]
    return Flow(leaders, bounds, successors)


def _natural_loops(instructions: list[Instruction]) -> list[frozenset[int]]:
    """The loops of the flow graph, each as the numbers of its instructions."""
    leaders, bounds, successors = flow_of(instructions)
    loops: dict[int, set[int]] = {}
    dominators = _dominators(successors)
    predecessors: dict[int, list[int]] = {n: [] for n in dominators}
    for block in dominators:
        for following in successors[block]:
            predecessors[following].append(block)
    for block, above in dominators.items():
        for head in successors[block]:
            if head in above:  # a way back: the loop is what reaches it without passing the head
                body = loops.setdefault(head, {head})
                ahead = [block]
                while ahead:
                    here = ahead.pop()
                    if here not in body:
                        body.add(here)
                        ahead += predecessors[here]
    return [
        frozenset(i for block in body for i in range(leaders[block], bounds[block]))
        for body in loops.values()
    ]


def _dominators(successors: list[list[int]]) -> dict[int, set[int]]:
    """For each basic block that can be reached, those on every way to it, itself among them."""
    reached, ahead = {0}, [0]
    while ahead:
        fresh = [n for n in successors[ahead.pop()] if n not in reached]
        reached.update(fresh)
        ahead += fresh
    before: dict[int, list[int]] = {n: [] for n in reached}
    for block in reached:
        for following in successors[block]:
            before[following].append(block)
    found = {n: set(reached) for n in reached}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            now = set.intersection(*(found[n] for n in before[block])) | {block}
            if now != found[block]:
                found[block], changed = now, True
    return found


_AMD_CLASSES = {
    "MFMA": r"v_mfma_\w+", "EXP": r"v_exp_f32\w*", "RCP": r"v_rcp_f32\w*",
    "FMA": r"v_(pk_)?(fma|fmac|mac)_f32\w*", "ADD": r"v_(pk_)?(add|sub)_f32\w*",
    "MUL": r"v_(pk_)?mul_f32\w*", "LOAD": r"(global|buffer|flat)_load_\w+",
    "STORE": r"(global|buffer|flat)_store_\w+", "ATOMIC": r"(global|buffer|flat)_atomic_\w+",
    "DS_READ": r"ds_read\w+", "DS_WRITE": r"ds_write\w+", "SCRATCH": r"scratch_\w+",
    "BARRIER": r"s_barrier",
}  # fmt: skip


def amdgcn_record(assembly: str) -> dict[str, Any]:
    """Registers, spills and instructions by class of AMD's assembly."""

    def stated(name: str) -> int:
        found = re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise ValueError(f"AMDGCN assembly without .{name}")
        return int(found[1])

    names = re.findall(r"^\t([a-z]\w+)", assembly, re.MULTILINE)
    counts = {
        kind: sum(re.fullmatch(pattern, name) is not None for name in names)
        for kind, pattern in _AMD_CLASSES.items()
    }
    return {
        "registers": stated("vgpr_count"),
        "stack": stated("private_segment_fixed_size"),
        "spilled_registers": stated("vgpr_spill_count") + stated("sgpr_spill_count"),
        "counts": {kind: n for kind, n in counts.items() if n},
    }


def code_hash(cubin: bytes) -> str:
    """The first 16 hex digits of the sha256 of a cubin's machine code: its executable sections.

    What else a cubin holds differs from machine to machine: the names of source files.

    Raises
    ------
    ValueError
        If it is no ELF file of 64 bits with machine code.
    """
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError(f"cubin: expected an ELF file of 64 bits, got {cubin[:5]!r}")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, number = struct.unpack_from("<HH", cubin, 58)
    total, digest = 0, hashlib.sha256()
    for i in range(number):
        # of the section's header: type, flags, address, offset, size
        kind, flags, _, at, length = struct.unpack_from("<IQQQQ", cubin, table + i * size + 4)
        if kind == 1 and flags & 4:  # SHT_PROGBITS, SHF_EXECINSTR
            digest.update(cubin[at : at + length])
            total += length
    if not total:
        raise ValueError("cubin: no section with machine code")
    return digest.hexdigest()[:_HASH_DIGITS]
