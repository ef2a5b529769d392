"""Predict the edge pass's time on a GPU from its compiled code: ``python bench/model.py``.

Nothing is run on a GPU. A kernel is compiled offline, the instructions of its loop over blocks are
counted, and each unit of a multiprocessor gets the cycles that they keep it busy; bytes of L2 and
HBM come from the algorithm. The busiest unit bounds the time from below. See bench/README.md.
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

from egnn_fast.kernels.blocks import blocks_for
from egnn_fast.kernels.configurations import PASSES, Configuration
from egnn_fast.kernels.disassembly import Loop
from egnn_fast.kernels.offline import Record, compile_all
from egnn_fast.kernels.records import padded

WARP = 32
SECTOR = 32  # bytes: what a gather moves at least
WINDOW = 16  # rows of the kernels' sums over receivers


@dataclass(frozen=True)
class Gpu:
    """A GPU's rates; those of a multiprocessor for each of its clocks.

    Attributes
    ----------
    arch : what its code is compiled for
    multiprocessors, ghz : their number, the boost clock
    macs : multiply-adds of the matrix units, dense, by instruction and type
    fma : lanes of float32 arithmetic
    l2_bytes_per_clock : of all multiprocessors together
    l2_bytes, hbm_gb : L2's size, GB/s of the memory
    l1_bytes : of a multiprocessor, shared memory among them
    """

    arch: str
    multiprocessors: int
    ghz: float
    macs: Mapping[str, float]
    fma: int
    l2_bytes_per_clock: int
    l2_bytes: int
    hbm_gb: float
    l1_bytes: int


# NVIDIA A100 Tensor Core GPU Architecture (white paper, 2020): 108 SMs, 1410 MHz, 312 TFLOPS in
# 16 bits and 156 in tf32, 64 FP32 lanes, L2 of 40 MB that reads 5120 bytes a clock; the data sheet
# of the 80 GB SXM model: 2039 GB/s. L1 and shared memory: 192 KB, H100's 256 KB.
# NVIDIA H100 Tensor Core GPU Architecture (white paper, 2022), SXM5: 132 SMs, 989.4 TFLOPS in 16
# bits and 494.7 in tf32, dense, which is 2048 and 1024 multiply-adds at 1830 MHz; 128 FP32 lanes,
# L2 of 50 MB, 3.35 TB/s. No bandwidth of L2 is given there: A100's is taken.
# HMMA on Hopper: 62.9 % of the peak, as measured in arXiv 2402.13499; HGMMA: all of it.
# NVIDIA H200 Tensor Core GPU (data sheet, 2024), SXM: H100's multiprocessors, 4.8 TB/s.
_MMA_SHARE = 0.629
_HOPPER = {
    "HGMMA.BF16": 2048, "HGMMA.F16": 2048, "HGMMA.TF32": 1024,
    "HMMA.BF16": 2048 * _MMA_SHARE, "HMMA.F16": 2048 * _MMA_SHARE, "HMMA.TF32": 1024 * _MMA_SHARE,
}  # fmt: skip
_AMPERE = {"HMMA.BF16": 1024, "HMMA.F16": 1024, "HMMA.TF32": 512}
GPUS = {
    "a100": Gpu("sm_80", 108, 1.410, _AMPERE, 64, 5120, 40 << 20, 2039, 192 << 10),
    "h100": Gpu("sm_90", 132, 1.830, _HOPPER, 128, 5120, 50 << 20, 3350, 256 << 10),
    "h200": Gpu("sm_90", 132, 1.830, _HOPPER, 128, 5120, 50 << 20, 4800, 256 << 10),
}
# CUDA C++ Programming Guide, throughput of native arithmetic instructions, 8.0 and 9.0: results of
# a multiprocessor for each clock
SPECIAL, INTEGER, SHUFFLE = 16, 64, 32
ISSUE = 4  # warps' instructions for each clock: one of each scheduler
L1_BYTES = 128  # bytes of L1 and shared memory for each clock, both white papers
_FLOAT = ("FFMA", "FADD", "FMUL", "PACKED")
_MEMORY = (
    "LDG",
    "STG",
    "LDS",
    "STS",
    "LDSM",
    "STSM",
    "LDL",
    "STL",
    "RED",
    "ATOM",
    "ATOMG",
    "ATOMS",
)


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
    """What is predicted of a kernel on a GPU.

    Attributes
    ----------
    cycles : for each edge: cycles of a multiprocessor that a unit is busy; L2's and HBM's share too
    l2_bytes, hbm_bytes : for each edge
    limit : the busiest unit
    ns_per_edge : its time, of the whole GPU
    ms : its time for all edges of the problem; ms_in_turn : if no two units worked at once
    """

    cycles: dict[str, float]
    l2_bytes: float
    hbm_bytes: float
    limit: str
    ns_per_edge: float
    ms: float
    ms_in_turn: float


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


def unit_cycles(
    loops: Sequence[Loop], gpu: Gpu, warps: int, edges: int, rows: float
) -> dict[str, float]:
    """Cycles of each unit of a multiprocessor for each edge."""
    counts: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    for loop in loops:
        times = trips(loop.kind, rows)
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
        "issue": sum(counts.values()) / ISSUE,
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
    """Cycles, bytes and time of a compiled kernel."""
    if not record.loops:
        raise ValueError(f"{record.configuration.label}: no loop with matrix instructions")
    rows = rows_of_block(record.edges, problem.degree)
    cycles = unit_cycles(record.loops, gpu, record.warps, record.edges, rows)
    l2_bytes, hbm_bytes = traffic(record, gpu, problem)
    l2_bytes += spilled_traffic(record, gpu, rows)
    # as if each multiprocessor had its share of what all have together
    cycles["l2"] = l2_bytes * gpu.multiprocessors / gpu.l2_bytes_per_clock
    cycles["hbm"] = hbm_bytes * gpu.multiprocessors * gpu.ghz / gpu.hbm_gb
    limit = max(cycles, key=lambda unit: cycles[unit])
    ns = 1 / (gpu.multiprocessors * gpu.ghz)
    ms = problem.edges * ns * 1e-6
    return Prediction(
        cycles=cycles, l2_bytes=l2_bytes, hbm_bytes=hbm_bytes, limit=limit,
        ns_per_edge=cycles[limit] * ns, ms=cycles[limit] * ms, ms_in_turn=sum(cycles.values()) * ms,
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
    """A pass in stages, one after the other; the products between them at the BLAS's peak."""
    c, rows = records[0].configuration, rows_of_block(records[0].edges, problem.degree)
    backward = records[-1].configuration.kernel.endswith("backward")
    per_byte = gpu.multiprocessors / gpu.l2_bytes_per_clock
    tile = c.hidden * (2 if c.precision in ("bf16", "fp16") else 4) * per_byte
    kind = {"bf16": "BF16", "fp16": "F16", "high": "TF32"}.get(c.precision)
    rate = max((n for name, n in gpu.macs.items() if name.endswith(f".{kind}")), default=gpu.fma)
    # backward: two products again, two back, two outer ones
    products = {
        "matrix": (6 if backward else 2) * c.hidden**2 / rate,
        "l2": (12 if backward else 4) * tile,
    }
    stages = [products]
    for record in records:
        cycles = unit_cycles(record.loops, gpu, record.warps, record.edges, rows)
        stages.append(cycles | {"l2": _TILES[record.configuration.kernel] * tile})
    whole = replace(c, kernel="edge_backward" if backward else "edge_forward")
    l2_bytes, hbm_bytes = traffic(replace(records[0], configuration=whole), gpu, problem)
    stages.append({"l2": l2_bytes * per_byte})
    cycles = {unit: sum(s.get(unit, 0.0) for s in stages) for unit in stages[1] | stages[-1]}
    cycles["hbm"] = hbm_bytes * gpu.multiprocessors * gpu.ghz / gpu.hbm_gb
    in_turn = sum(max(s.values()) for s in stages)
    limit = "stages" if in_turn > cycles["hbm"] else "hbm"
    ns = 1 / (gpu.multiprocessors * gpu.ghz)
    least = max(in_turn, cycles["hbm"])
    return Prediction(
        cycles=cycles, l2_bytes=cycles["l2"] / per_byte, hbm_bytes=hbm_bytes, limit=limit,
        ns_per_edge=least * ns, ms=least * problem.edges * ns * 1e-6,
        ms_in_turn=sum(cycles.values()) * problem.edges * ns * 1e-6,
    )  # fmt: skip


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
    for name in (*units, "limit", "ns/edge", "ms", "in turn"):
        table.add_column(name, justify="right")
    for gpu, record, found in rows:
        c = record.configuration
        block = f"{record.edges}×{record.warps}"
        table.add_row(
            gpu, _name(c.kernel), str(c.hidden), c.precision, block,
            str(record.stack), *(f"{found.cycles[unit]:.1f}" for unit in units), found.limit,
            f"{found.ns_per_edge:.3f}", f"{found.ms:.2f}", f"{found.ms_in_turn:.2f}",
        )  # fmt: skip
    return table


def _name(kernel: str) -> str:
    """The pass, given its last kernel."""
    if kernel.startswith("edge_"):
        return kernel.removeprefix("edge_")
    return "backward, staged" if kernel.endswith("backward") else "forward, staged"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, predict, print."""
    parser = argparse.ArgumentParser(description="Predict the edge pass's time on a GPU.")
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
    Console(width=200).print(table_of(rows, problem))
    if args.json is not None:
        found = [
            {"gpu": name, **asdict(record.configuration), "block_edges": record.edges,
             "warps": record.warps, "registers": record.registers, "stack": record.stack,
             **asdict(prediction)}
            for name, record, prediction in rows
        ]  # fmt: skip
        content = {"schema": 1, "prediction": True, **asdict(problem), "rows": found}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
