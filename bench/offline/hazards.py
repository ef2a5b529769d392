"""Finds registers of an asynchronous matrix instruction that are accessed before it is done.

HGMMA reads A, and writes D, after it was issued. Until a WARPGROUP.DEPBAR has waited for it, no
other instruction may write A or D, or read D: an assembler that reuses a register of A too early
generates code with wrong results (triton#9433, triton#11781). Takes parsed instructions, returns
text; does not import Triton.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from bench.offline.disassembly import Instruction, flow_of

_REGISTER = re.compile(r"[-|!~]*R(\d+)\b")
_PREDICATE = re.compile(r"!?U?P(\d+|T)$")
# these write no register: their first operand after the predicates is a source
_WRITES_NONE = (
    "ISETP", "FSETP", "DSETP", "HSETP2", "FCHK", "BAR", "WARPSYNC", "BRX", "JMX", "CALL", "RET",
    "NANOSLEEP",
)  # fmt: skip
_DOUBLE = ("DADD", "DMUL", "DFMA", "DMNMX", "CS2R")
_A_REGISTERS = 4  # of 64 rows and 32 bytes of each, a thread's part
_MOST_GROUPS = 8  # DEPBAR counts up to 7


class _Product(NamedTuple):
    """The registers of an HGMMA; A is empty where it lies in shared memory."""

    a: frozenset[int]
    d: frozenset[int]


# products that may not be done, each with the number of groups closed since it was issued
_Pending = dict[int, int]


def hazards(instructions: Sequence[Instruction]) -> list[str]:
    """Each access to a register of A or D before its HGMMA is known to be done: a line of text.

    Every path of the flow graph is followed, also those that never run. Reads of the upper
    registers of a wide operand are missed.
    """
    lines = list(instructions)
    products = {i: _product(line) for i, line in enumerate(lines) if _base(line) == "HGMMA"}
    if not products:
        return []
    flow = flow_of(lines)
    before: list[_Pending | None] = [None] * len(flow.starts)
    before[0] = {}
    ahead = [0]
    while ahead:
        block = ahead.pop()
        pending = dict(before[block] or {})
        for i in range(flow.starts[block], flow.ends[block]):
            _step(lines[i], i, pending)
        for following in flow.successors[block]:
            merged, known = _merge(before[following], pending), before[following]
            if known is None or merged != known:
                before[following] = merged
                ahead.append(following)
    texts: dict[str, None] = {}
    for block, start in enumerate(flow.starts):
        pending = dict(before[block] or {})
        for i in range(start, flow.ends[block]):
            for text in _conflicts(lines, i, products, pending):
                texts.setdefault(text)
            _step(lines[i], i, pending)
    return list(texts)


def _merge(one: _Pending | None, other: _Pending) -> _Pending:
    """Pending if pending on either path, with the smaller count of closed groups."""
    merged = dict(one or {})
    for i, groups in other.items():
        merged[i] = min(groups, merged.get(i, _MOST_GROUPS))
    return merged


def _step(line: Instruction, i: int, pending: _Pending) -> None:
    """What is under way after an instruction."""
    if _base(line) == "HGMMA":
        pending[i] = 0
        # the last product of a group closes it
        if "gsb0" in line.operands and not line.conditional:
            for each in pending:
                pending[each] = min(pending[each] + 1, _MOST_GROUPS)
    elif line.name.startswith("WARPGROUP.DEPBAR") and not line.conditional:
        left = int(line.operands[-1], 16)
        for each in [each for each, groups in pending.items() if groups > left]:
            del pending[each]


def _conflicts(
    lines: list[Instruction], i: int, products: dict[int, _Product], pending: _Pending
) -> list[str]:
    line, texts = lines[i], []
    mine = products.get(i)
    written = mine.d if mine else _written(line)
    read = mine.a if mine else _read(line)
    for each in pending:
        a, d = products[each]
        # products with the same D run one after the other
        chained = mine is not None and mine.d == d
        for verb, name, registers in (
            ("writes", "A", written & a),
            ("writes", "D", frozenset() if chained else written & d),
            ("reads", "D", read & d),
        ):
            if registers:
                where = f"{name} of {lines[each].name} at {lines[each].at:#06x}"
                texts.append(f"{line.name} at {line.at:#06x} {verb} R{min(registers)}, {where}")
    return texts


def _base(line: Instruction) -> str:
    return line.name.split(".")[0]


def _product(line: Instruction) -> _Product:
    """Its registers; each of 128 threads holds N / 2 words of D, or N / 4 if D is of 16 bits."""
    shape, *kinds = line.name.split(".")[1:]
    words = int(shape.split("x")[1]) // (4 if kinds[0] == "F16" else 2)
    d, a = (_REGISTER.match(operand) for operand in line.operands[:2])
    return _Product(_range(a, _A_REGISTERS), _range(d, words))


def _range(first: re.Match[str] | None, number: int) -> frozenset[int]:
    return frozenset(range(int(first[1]), int(first[1]) + number)) if first else frozenset()


def _destination(line: Instruction) -> re.Match[str] | None:
    """The register that it writes: the first operand behind the predicates that it sets."""
    if _base(line) in _WRITES_NONE:
        return None
    behind = (operand for operand in line.operands if not _PREDICATE.match(operand))
    return re.match(r"R(\d+)(?!\w)", next(behind, ""))


def _written(line: Instruction) -> frozenset[int]:
    return _range(_destination(line), _width(line.name))


def _read(line: Instruction) -> frozenset[int]:
    """The registers that it names, but the one that it writes; not all of a wide operand."""
    skip = _destination(line)
    operands = list(line.operands)
    if skip is not None:
        operands.remove(skip.string)
    return frozenset(int(n) for text in operands for n in re.findall(r"(?<![\w])R(\d+)\b", text))


def _width(name: str) -> int:
    """How many registers it writes."""
    base, *modifiers = name.split(".")
    if base == "HMMA":
        return 2 if modifiers[1] == "F16" else 4
    if base in ("IMMA", "DMMA"):
        return 4
    if base in ("LDSM", "LDTM"):
        return int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1
    if "128" in modifiers:
        return 4
    wide = {"64", "WIDE", "F64", "S64", "U64"} & set(modifiers)
    if base in ("F2F", "F2I", "I2F"):  # the type that it makes comes first
        return 2 if modifiers and modifiers[0] in ("F64", "S64", "U64") else 1
    return 2 if wide or (base in _DOUBLE and "32" not in modifiers) else 1
