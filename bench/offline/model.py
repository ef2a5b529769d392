"""Predict the edge pass's time on a GPU from its code: ``python -m bench.offline.model``.

Nothing is run on a GPU. A kernel is compiled offline, the instructions of its loop over blocks are
counted, and each unit of a multiprocessor gets the cycles that they keep it busy; bytes of L2 and
HBM come from the algorithm. The busiest unit bounds the time from below; from above what
:mod:`bench.offline.stalls` assumes. See bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.offline import launches, stalls
from bench.offline.chips import GPUS, INTEGER, L1_BYTES, SCHEDULERS, SHUFFLE, SPECIAL, WARP, Gpu
from bench.offline.compile import Record, compile_all
from bench.offline.configurations import PASSES, Configuration
from bench.offline.disassembly import Loop
from egnn_fast.backends.triton import call
from egnn_fast.kernels.blocks import blocks_for
from egnn_fast.kernels.records import padded

SECTOR = 32  # bytes: what a gather moves at least
WINDOW = 16  # rows of the kernels' sums over receivers
_FLOAT = ("FFMA", "FADD", "FMUL", "PACKED")
_MEMORY = (
    "LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDL", "STL", "RED", "ATOM", "ATOMG", "ATOMS",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A graph in which every node receives as many edges, from senders drawn at random."""

    nodes: int = 1_000_000
    edges: int = 32_000_000

    @property
    def degree(self) -> float:
        """Edges of a receiver."""
        return self.edges / self.nodes


@dataclass(frozen=True)
class Prediction:
    """What is predicted of a pass on a GPU.

    Attributes
    ----------
    cycles : for each edge: cycles of a multiprocessor that a unit is busy; L2's and HBM's share too
    l2_bytes, hbm_bytes : for each edge
    limit : the busiest unit
    ns_per_edge : its time, of the whole GPU
    ms_least : its time for all edges of the problem
    ms_likely_most : with what :mod:`bench.offline.stalls` assumes of waits and rates
    ms_in_turn : if no two units worked at once
    launches : of Triton's kernels and of PyTorch's operations
    host_ms : the host's time for these; the pass takes the longer of the two times
    """

    cycles: dict[str, float]
    l2_bytes: float
    hbm_bytes: float
    limit: str
    ns_per_edge: float
    ms_least: float
    ms_likely_most: float
    ms_in_turn: float
    launches: dict[str, int]
    host_ms: float

    @property
    def total_ms(self) -> tuple[float, float]:
        """The least and likely most of the pass, the host's time considered."""
        return max(self.ms_least, self.host_ms), max(self.ms_likely_most, self.host_ms)


def rows_of_block(edges: int, degree: float) -> float:
    """Receivers that a block of edges has on average."""
    return 1 + (edges - 1) / max(degree, 1.0)


def trips(kind: str, rows: float) -> int:
    """How often a loop runs for each block, ``rows`` being the block's receivers."""
    if kind == "window":
        return math.ceil(rows / WINDOW)
    if kind == "search":
        return max(1, math.ceil(math.log2(max(rows, 1))))
    return 1 if kind == "block" else 0  # waiting costs what is waited for


def trips_of(loops: Sequence[Loop], rows: float) -> list[int]:
    """The same for each of them."""
    return [trips(loop.kind, rows) for loop in loops]


def unit_cycles(
    loops: Sequence[Loop], gpu: Gpu, warps: int, edges: int, rows: float
) -> dict[str, float]:
    """Cycles of each unit of a multiprocessor for each edge."""
    counts: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    for loop, times in zip(loops, trips_of(loops, rows), strict=True):
        counts.update({name: times * n for name, n in loop.counts.items()})
        macs.update({name: times * n for name, n in loop.macs.items()})
    if counts["UTCMMA"]:
        raise ValueError("UTC*MMA: the code does not tell how much it multiplies")
    special = counts["CONVERT"] + sum(n for name, n in counts.items() if name.startswith("MUFU."))
    lanes = {
        "special": special * WARP / SPECIAL,
        "fma": sum(counts[n] for n in _FLOAT) * WARP / gpu.fma + counts["IMAD"] * WARP / INTEGER,
        "alu": counts["ALU"] * WARP / INTEGER,
        "l1": (counts["SHFL"] + counts["REDUX"]) * WARP / SHUFFLE
        + sum(n * _bytes(name) / L1_BYTES for name, n in counts.items() if _is_memory(name)),
        "issue": sum(counts.values()) / SCHEDULERS,
        "matrix": sum(n / gpu.macs[name] for name, n in macs.items()),
    }
    return {unit: busy * warps / edges for unit, busy in lanes.items()}


def _is_memory(name: str) -> bool:
    return name.split(".")[0] in _MEMORY


def _bytes(name: str) -> float:
    """Bytes that a warp's access moves; one of less than 32 bits takes as long as one of 32."""
    return WARP * max(32, int(name.split(".")[1])) / 8


def traffic(record: Record, gpu: Gpu, problem: Problem) -> tuple[float, float]:
    """``(L2, HBM)``: bytes for each edge, from the algorithm.

    A sender's rows come through L2, and from HBM where L2 is too small for all of them. A block
    reads its receivers' rows once; HBM moves those once for each node. An atomic addition reads
    and writes.
    """
    c, backward = record.configuration, record.configuration.kernel == "edge_backward"
    operand = 2 if c.precision in ("bf16", "fp16") else 4
    rows = rows_of_block(record.edges, problem.degree) / record.edges
    gathered = _sectors(c.width * operand) + _sectors(c.dim * 4)
    listed = (0 if c.complete else 8) + 4 * c.permuted + 4 * c.attrs + 4 * c.mask
    node = c.width * operand + c.dim * 4  # P and x of a receiver
    sums = 4 * (c.width + (c.dim if c.head or backward else 0))
    missed = _missed(problem.nodes * (c.width * operand + c.dim * 4), gpu)
    l2 = gathered + listed + rows * (node + sums)
    hbm = missed * gathered + listed + (node + sums) / problem.degree
    if backward:
        cotangents = 4 * (c.width + c.dim * c.head)
        l2 += rows * cotangents
        hbm += cotangents / problem.degree
        added = _sectors(c.width * 4) + _sectors(c.dim * 4)
        l2 += 2 * added + 4 * c.attrs
        hbm += 2 * added * _missed(problem.nodes * 4 * (c.width + c.dim), gpu) + 4 * c.attrs
        # sums for w2 and w3 that each block reads and writes
        l2 += 2 * min(c.row.in_memory, 1 + c.head) * 4 * c.width**2 / record.edges
    return l2, hbm


def spilled_traffic(record: Record, gpu: Gpu, rows: float) -> float:
    """Bytes for each edge of what registers do not hold and L1 neither, which go to L2.

    L1 has what the programs' shared memory leaves of it.
    """
    programs = record.configuration.row.programs
    spilled = record.stack * record.warps * WARP * programs
    if spilled == 0:
        return 0.0
    beyond = 1 - max(0, gpu.l1_bytes - record.shared * programs) / spilled
    moved = sum(
        trips(loop.kind, rows) * n * _bytes(name)
        for loop in record.loops
        for name, n in loop.counts.items()
        if name.startswith(("LDL", "STL"))
    )
    return max(0.0, beyond) * moved * record.warps / record.edges


def _sectors(size: int) -> int:
    return -(-size // SECTOR) * SECTOR


def _missed(size: int, gpu: Gpu) -> float:
    """The share of random reads of so many bytes that L2 does not hold."""
    return max(0.0, 1 - gpu.l2_bytes / size)


def predict(record: Record, gpu: Gpu, problem: Problem) -> Prediction:
    """Cycles, bytes and time of a pass that is one kernel."""
    if not record.loops:
        raise ValueError(f"{record.configuration.label}: no loop with matrix instructions")
    rows = rows_of_block(record.edges, problem.degree)
    cycles = unit_cycles(record.loops, gpu, record.warps, record.edges, rows)
    l2_bytes, hbm_bytes = traffic(record, gpu, problem)
    cycles |= memory_cycles(l2_bytes + spilled_traffic(record, gpu, rows), hbm_bytes, gpu)
    most = stalls.stalled(record, gpu, trips_of(record.loops, rows), cycles)
    return _prediction(record.configuration, gpu, problem, [cycles], [most])


def memory_cycles(l2_bytes: float, hbm_bytes: float, gpu: Gpu) -> dict[str, float]:
    """Cycles for so many bytes, as if each multiprocessor had its share of what all have."""
    return {
        "l2": l2_bytes * gpu.multiprocessors / gpu.l2_bytes_per_clock,
        "hbm": hbm_bytes * gpu.multiprocessors * gpu.ghz / gpu.hbm_gb,
    }


def _prediction(
    c: Configuration, gpu: Gpu, problem: Problem,
    stages: Sequence[Mapping[str, float]], stalled: Sequence[Mapping[str, float]],
) -> Prediction:  # fmt: skip
    """Of what runs one after the other, given cycles of its units for each edge."""
    units = {unit: None for stage in reversed(stages) for unit in stage}
    cycles = {unit: sum(stage.get(unit, 0.0) for stage in stages) for unit in units}
    least = sum(max(stage.values()) for stage in stages)
    limit = max(cycles, key=lambda unit: cycles[unit])
    ns = 1 / (gpu.multiprocessors * gpu.ghz)
    ms = problem.edges * ns * 1e-6
    found = launches.launches_of(
        c.direction, c.hidden, c.precision, problem.edges, arch=c.arch
    )  # fmt: skip
    return Prediction(
        cycles=cycles,
        l2_bytes=cycles["l2"] * gpu.l2_bytes_per_clock / gpu.multiprocessors,
        hbm_bytes=cycles["hbm"] * gpu.hbm_gb / gpu.multiprocessors / gpu.ghz,
        limit=limit if len(stages) == 1 else "stages",
        ns_per_edge=least * ns, ms_least=least * ms,
        ms_likely_most=sum(map(stalls.longest, stalled)) * ms,
        ms_in_turn=sum(cycles.values()) * ms, launches=asdict(found), host_ms=found.seconds * 1e3,
    )  # fmt: skip


def prediction_of(records: Sequence[Record], gpu: Gpu, problem: Problem) -> Prediction:
    """Of a pass's kernels."""
    if len(records) == 1:
        return predict(records[0], gpu, problem)
    return predict_stages(records, gpu, problem)


# tiles [edges, H] that a stage reads or writes
_TILES = {
    "staged_first": 1, "staged_messages": 2, "staged_shifts": 1,
    "staged_shifts_backward": 2, "staged_messages_backward": 3, "staged_first_backward": 1,
}  # fmt: skip


def predict_stages(records: Sequence[Record], gpu: Gpu, problem: Problem) -> Prediction:
    """A pass in stages, one after the other, with products of the BLAS between them.

    At least the products run at the matrix units' peak, and what L2 holds of a chunk's tiles is not
    read from HBM; likely at most, all tiles are, and the products reach a share of the peak.
    """
    c, rows = records[-1].configuration, rows_of_block(records[0].edges, problem.degree)
    backward = c.direction == "backward"
    number = c.width * launches.operand_bytes(c.precision)
    held = launches.held_bytes(c.direction, c.hidden, c.precision, staged_pass=True)
    missed = _missed(min(call.CHUNK_BYTES, held * problem.edges), gpu)
    kind = {"bf16": "BF16", "fp16": "F16", "high": "TF32"}.get(c.precision)
    rate = max((n for name, n in gpu.macs.items() if name.endswith(f".{kind}")), default=gpu.fma)
    whole = replace(
        records[0].configuration, kernel="edge_backward" if backward else "edge_forward"
    )
    l2_bytes, hbm_bytes = traffic(replace(records[0], configuration=whole), gpu, problem)

    def of_tiles(tiles: float, share: float) -> tuple[float, float]:
        return tiles * number, tiles * number * share

    # backward: two products again, two back, two outer ones
    products = {"matrix": (6 if backward else 2) * c.hidden**2 / rate}
    tiles = 12 if backward else 4
    stages = [products | memory_cycles(*of_tiles(tiles, missed), gpu)]
    stalled = [
        {"matrix": products["matrix"] / stalls.BLAS_SHARE}
        | stalls.slower_memory(memory_cycles(*of_tiles(tiles, 1.0), gpu))
    ]
    for k, record in enumerate(records):
        cycles = unit_cycles(record.loops, gpu, record.warps, record.edges, rows)
        for share, found in ((missed, stages), (1.0, stalled)):
            l2, hbm = of_tiles(_TILES[record.configuration.kernel], share)
            if k == 0:  # what is gathered and summed, all of it counted here
                l2, hbm = l2 + l2_bytes, hbm + hbm_bytes
            own = cycles | memory_cycles(l2, hbm, gpu)
            if found is stalled:
                own = stalls.stalled(record, gpu, trips_of(record.loops, rows), own)
            found.append(own)
    return _prediction(c, gpu, problem, stages, stalled)


def kernels_of(direction: str, arch: str, hidden: int, precision: str) -> list[Configuration]:
    """A pass: one kernel, or several in stages."""
    row = blocks_for(direction, precision, padded(hidden), arch)
    fused, *stages = PASSES[direction]
    if not row.staged:
        return [Configuration(fused, arch, hidden, precision=precision)]
    if direction == "backward":
        stages = [*PASSES["forward"][1:3], *stages]
    return [Configuration(k, arch, hidden, precision=precision, blocks=row) for k in stages]


def table_of(rows: Sequence[tuple[str, Record, Prediction]], problem: Problem) -> Table:
    """What is printed."""
    title = (
        f"A prediction from compiled code, not a measurement: N = {problem.nodes:,}, "
        f"E = {problem.edges:,}; cycles of a multiprocessor for each edge"
    )
    table = Table(title=title)
    units = list(rows[0][2].cycles)
    for name in ("GPU", "kernel", "H", "precision", "block", "stack"):
        table.add_column(name)
    last = ("limit", "ns/edge", "ms, least", "likely most", "in turn", "launches", "host ms")
    for name in (*units, *last):
        table.add_column(name, justify="right")
    for gpu, record, found in rows:
        c = record.configuration
        block = f"{record.edges}×{record.warps}"
        table.add_row(
            gpu, _name(c.kernel), str(c.hidden), c.precision, block,
            str(record.stack), *(f"{found.cycles[unit]:.1f}" for unit in units), found.limit,
            f"{found.ns_per_edge:.3f}", f"{found.ms_least:.2f}", f"{found.ms_likely_most:.2f}",
            f"{found.ms_in_turn:.2f}", str(sum(found.launches.values())), f"{found.host_ms:.2f}",
        )  # fmt: skip
    return table


def both_table(rows: Sequence[tuple[str, Record, Prediction]]) -> Table:
    """Forward and backward together; each takes the longer of the GPU's and the host's time."""
    table = Table(title="Forward and backward together")
    for name in ("GPU", "H", "precision"):
        table.add_column(name)
    for name in ("launches", "host ms", "ms, least", "likely most"):
        table.add_column(name, justify="right")
    found: dict[tuple[str, int, str], list[Prediction]] = {}
    for gpu, record, prediction in rows:
        c = record.configuration
        found.setdefault((gpu, c.hidden, c.precision), []).append(prediction)
    for (gpu, hidden, precision), passes in found.items():
        if len(passes) == 2:
            number = sum(sum(p.launches.values()) for p in passes)
            host = sum(p.host_ms for p in passes)
            least, most = (sum(p.total_ms[k] for p in passes) for k in range(2))
            table.add_row(gpu, str(hidden), precision, f"{number:,}", f"{host:.2f}", f"{least:.2f}",
                          f"{most:.2f}")  # fmt: skip
    return table


def _name(kernel: str) -> str:
    """The pass, given its last kernel."""
    if kernel.startswith("edge_"):
        return kernel.removeprefix("edge_")
    return "backward, staged" if kernel.endswith("backward") else "forward, staged"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, predict, print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.offline.model", description="Predict the edge pass's time on a GPU."
    )
    parser.add_argument("--arch", nargs="+", choices=GPUS, default=["h200"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--precision", nargs="+", default=["bf16", "high", "highest"],
                        choices=["bf16", "fp16", "high", "highest"])  # fmt: skip
    parser.add_argument("--kernel", nargs="+", choices=["forward", "backward"],
                        default=["forward", "backward"])  # fmt: skip
    parser.add_argument("--nodes", type=int, default=Problem.nodes)
    parser.add_argument("--edges", type=int, default=Problem.edges)
    parser.add_argument("--processes", type=int, default=2, help="of the compiler")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(arguments)
    problem = Problem(args.nodes, args.edges)
    wanted = [
        kernels_of(kernel, arch, hidden, precision)
        for arch in dict.fromkeys(GPUS[name].arch for name in args.arch)
        for hidden in args.hidden
        for kernel in args.kernel
        for precision in args.precision
    ]
    compiled = iter(compile_all([c for each in wanted for c in each], args.processes))
    passes = [[next(compiled) for _ in each] for each in wanted]
    rows = [
        (name, records[-1], prediction_of(records, GPUS[name], problem))
        for name in args.arch
        for records in passes
        if records[0].configuration.arch == GPUS[name].arch
    ]
    console = Console(width=240)
    console.print(table_of(rows, problem))
    console.print(both_table(rows))
    if args.json is not None:
        found = [
            {"gpu": name, **asdict(record.configuration), "block_edges": record.edges,
             "warps": record.warps, "registers": record.registers, "stack": record.stack,
             "programs": stalls.programs_that_fit(record, GPUS[name]),
             **asdict(prediction), "total_ms": prediction.total_ms}
            for name, record, prediction in rows
        ]  # fmt: skip
        content = {"schema": 2, "prediction": True, **asdict(problem), "rows": found}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
