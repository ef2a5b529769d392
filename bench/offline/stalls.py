"""The upper estimate of a time: waits, and units that do not reach their rates.

Every number has its source or is marked as assumed. Times measured on an H200 were 1.0 to 2.4 times
the upper end: bench/results/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.offline.chips import SCHEDULERS, WARP, Gpu
from bench.offline.compile import Record
from bench.offline.disassembly import Loop

# clocks until a warp can use the result of its last instruction; Jia et al., arXiv 1804.06826, for
# Volta. Assumed: later ones take as long, and each instruction uses the last one's result
DEPENDENT = 4
# clocks for which a program waits at a barrier, its warps not arriving at once: assumed
BARRIER = 30
# clocks of a read from HBM in a busy GPU: assumed, some 480 in an idle H100 (arXiv 2402.13499)
READ = 800
# Dependent loads of a block, counted in the kernels' source: the numbers of an edge's nodes, then
# the rows of these; a row's bounds in rowptr, before sums and again before cotangents, then the
# rows of these; a tile of the stage before. Assumed: none is issued ahead.
READS: dict[str, int] = {
    "edge_forward": 3, "edge_backward": 5,
    "staged_first": 2, "staged_messages": 2, "staged_shifts": 3,
    "staged_shifts_backward": 2, "staged_messages_backward": 2, "staged_first_backward": 3,
}  # fmt: skip
L2_SHARE = 0.5  # of A100's rate, for each clock: assumed
HBM_SHARE = 0.9  # of the data sheet's: assumed, what a large copy reaches
BLAS_SHARE = 0.7  # of the matrix units' peak, by products of tall matrices: assumed
# registers of a multiprocessor; those of a warp come in units (CUDA's occupancy calculator), and a
# program's shared memory has 1 KB more (CUDA C++ Programming Guide, 8.0 and 9.0)
REGISTERS, REGISTER_UNIT, SHARED_MORE = 1 << 16, 256, 1 << 10


def programs_that_fit(record: Record, gpu: Gpu) -> int:
    """How many of a multiprocessor's programs it holds at once."""
    registers = -(-record.registers * WARP // REGISTER_UNIT) * REGISTER_UNIT * record.warps
    most = min(REGISTERS // registers, gpu.shared_bytes // (record.shared + SHARED_MORE))
    return max(1, min(record.configuration.row.programs, most))


def barriers(loops: Sequence[Loop], trips: Sequence[int]) -> int:
    """Barriers of a block."""
    return sum(n * loop.counts.get("BAR", 0) for loop, n in zip(loops, trips, strict=True))


def stalled(
    record: Record, gpu: Gpu, trips: Sequence[int], cycles: Mapping[str, float]
) -> dict[str, float]:
    """Cycles for each edge where units do not reach their rates; ``waits`` comes on top of them.

    ``trips`` says how often each loop runs for a block. Nothing hides a program's waits, but the
    programs of a multiprocessor wait at the same time.
    """
    programs = programs_that_fit(record, gpu)
    warps = programs * record.warps / SCHEDULERS
    # programs that do not fit run when the others are done
    launched = record.configuration.row.programs
    turns = -(-launched // programs) * programs / launched
    slower = dict(cycles)
    slower["issue"] = cycles["issue"] / min(1.0, warps / DEPENDENT)
    waiting = READS[record.configuration.kernel] * READ + barriers(record.loops, trips) * BARRIER
    slower["waits"] = waiting / (programs * record.edges)
    slower = {unit: turns * busy for unit, busy in slower.items()}
    return slower_memory(slower)


def slower_memory(cycles: Mapping[str, float]) -> dict[str, float]:
    """L2 and HBM at the rates that are assumed of them."""
    shares = {"l2": L2_SHARE, "hbm": HBM_SHARE}
    return {unit: busy / shares.get(unit, 1.0) for unit, busy in cycles.items()}


def longest(cycles: Mapping[str, float]) -> float:
    """The busiest unit's cycles, and the waits."""
    return max(busy for unit, busy in cycles.items() if unit != "waits") + cycles.get("waits", 0.0)
