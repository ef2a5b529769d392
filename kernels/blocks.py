"""Block sizes: edges of a block, warps of a program, programs of a multiprocessor.

One row for each architecture, pass, padded width and precision, with where it comes from. Widths
and architectures without a row of their own take the nearest one. No tuning at import.
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
    ("forward", "high", 128): Blocks(64, 4, 2, False, _OFFLINE, stream=True),
    ("forward", "highest", 64): Blocks(64, 4, 2, False, _OFFLINE),
    ("forward", "highest", 128): Blocks(32, 8, 1, False, _OFFLINE, stream=True),
    ("backward", "16", 64): Blocks(64, 4, 2, False, _OFFLINE),
    ("backward", "16", 128): Blocks(128, 8, 1, True, _OFFLINE, stream=True),
    ("backward", "high", 64): Blocks(64, 4, 2, False, _OFFLINE, stream=True),
    ("backward", "high", 128): Blocks(64, 8, 1, True, _OFFLINE, stream=True),
    ("backward", "highest", 64): Blocks(32, 4, 2, False, _OFFLINE, stream=True),
    ("backward", "highest", 128): Blocks(32, 8, 1, True, _OFFLINE, stream=True),
}


def blocks_for(direction: str, precision: str, width: int) -> Blocks:
    """The row for a pass (``"forward"``, ``"backward"``), a precision and a padded width."""
    kind = "16" if precision in ("bf16", "fp16") else precision
    fitting = [w for d, p, w in TABLE if (d, p) == (direction, kind) and w >= width]
    return TABLE[direction, kind, min(fitting)]
