"""Block sizes: edges of a block, warps of a program, programs of a multiprocessor.

One row for each pass, padded width and precision, with where it comes from; Ampere and
Blackwell have rows of their own. Widths without a row take the next one's. No tuning at import.
"""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    """How a kernel is launched.

    Attributes
    ----------
    edges : edges of a block
    warps : warps of a program
    programs : programs of a multiprocessor
    spill : backward: sums for w2 and w3 in memory, not in registers
    source : where the row comes from
    stream : weights read anew for each block, not kept in shared memory
    spills : bytes of stack on sm_90, the most of the row's widths: registers that went to memory
    """

    edges: int
    warps: int
    programs: int
    spill: bool
    source: str
    stream: bool = False
    spills: int = 0


_OFFLINE = "offline: the least predicted time on sm_90, Triton 3.7"

# (pass, precision, largest padded width) in ascending width; "16": bf16 and fp16
TABLE: dict[tuple[str, str, int], Blocks] = {
    ("forward", "16", 64): Blocks(64, 4, 3, False, _OFFLINE),
    ("forward", "16", 128): Blocks(64, 4, 2, False, _OFFLINE, stream=True),
    ("forward", "high", 64): Blocks(64, 4, 2, False, _OFFLINE),
    ("forward", "high", 128): Blocks(64, 4, 2, False, _OFFLINE, stream=True, spills=136),
    ("forward", "highest", 64): Blocks(64, 4, 2, False, _OFFLINE),
    ("forward", "highest", 128): Blocks(32, 8, 1, False, _OFFLINE, stream=True, spills=80),
    ("backward", "16", 64): Blocks(64, 4, 2, False, _OFFLINE, spills=296),
    ("backward", "16", 128): Blocks(128, 8, 1, True, _OFFLINE, stream=True, spills=1048),
    ("backward", "high", 64): Blocks(64, 4, 2, False, _OFFLINE, stream=True, spills=912),
    ("backward", "high", 128): Blocks(64, 8, 1, True, _OFFLINE, stream=True, spills=1408),
    ("backward", "highest", 64): Blocks(32, 4, 2, False, _OFFLINE, stream=True, spills=928),
    ("backward", "highest", 128): Blocks(32, 8, 1, True, _OFFLINE, stream=True, spills=1160),
}
# the stages of wide layers, all of them
TABLE |= {
    ("wide", "16", 256): Blocks(32, 8, 2, False, _OFFLINE),
    ("wide", "high", 256): Blocks(16, 8, 2, False, _OFFLINE, spills=64),
    ("wide", "highest", 256): Blocks(16, 8, 2, False, _OFFLINE, spills=32),
}


# Ampere's shared memory is smaller
AMPERE = {
    ("backward", "16", 128): Blocks(
        32, 8, 1, True, "offline: fits into sm_80, Triton 3.7", stream=True
    ),
}
# Blackwell's matrix units take 64 rows and more by way of a memory of their own, which Triton 3.7
# cannot lay out for these kernels: there blocks stay below
BLACKWELL: dict[tuple[str, str, int], Blocks] = {
    (direction, kind, width): Blocks(
        32, 4 if width <= 64 else 8, 1, direction == "backward" and width > 64,
        "offline: compiles for sm_100, Triton 3.7", stream=width > 64,
    )
    for direction, kind, width in TABLE
}  # fmt: skip


def blocks_for(direction: str, precision: str, width: int, arch: str = "sm_90") -> Blocks:
    """The row for a pass, a precision and a padded width.

    The pass is ``"forward"`` or ``"backward"``, or ``"wide"`` for the stages of both.
    ``arch`` is the architecture's name; those without rows of their own take those of sm_90.
    """
    kind = "16" if precision in ("bf16", "fp16") else precision
    fitting = [w for d, p, w in TABLE if (d, p) == (direction, kind) and w >= width]
    key = (direction, kind, min(fitting))
    if arch.startswith(("sm_10", "sm_12")):
        return BLACKWELL[key]
    if arch.startswith("sm_8"):
        return AMPERE.get(key, TABLE[key])
    return TABLE[key]


def sender_block(width: int) -> int:
    """Edges of a block of the sums over senders."""
    return 64 if width <= 64 else 32
