"""Compile every shipped kernel without a GPU: ``python -m bench.offline``.

Writes to bench/results/offline.json, for each: registers, stack (where spilled registers go),
shared memory, and what the spills cost in the loop over blocks. Prints the kernels that spill, and
registers of asynchronous products that are accessed too early. ``TRITON_PTXAS_PATH`` and
``DISABLE_MMA_V3=1`` act as they do on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.offline.compile import Record, compile_all
from bench.offline.configurations import NVIDIA, TARGETS, shipped
from bench.offline.disassembly import number_of
from egnn_fast.experiments.io import write_atomic
from egnn_fast.kernels.records import padded

RESULTS = Path(__file__).resolve().parents[1] / "results" / "offline.json"
WARP = 32
_LANE_BITS = 32  # an access of 32 bits by each lane of a warp takes the memory unit one cycle


def summary(record: Record) -> dict[str, Any]:
    """The row of a kernel."""
    c = record.configuration
    return {
        "kernel": c.kernel, "arch": c.arch, "hidden": c.hidden, "precision": c.precision,
        "edges": record.edges, "warps": record.warps, "registers": record.registers,
        "stack": record.stack, "shared": record.shared,
        "local_accesses": number_of(record.counts, "LDL", "STL"),
        "spill_cycles_per_edge": round(spill_cycles(record), 2),
        "exponentials": round(per_edge_and_channel(record, "MUFU.EX2"), 4),
    }  # fmt: skip


def spill_cycles(record: Record) -> float:
    """Cycles of a multiprocessor's memory unit per edge that spilled registers take."""
    if not record.loops:
        return 0.0
    lanes = sum(
        n * max(1.0, int(name.split(".")[1]) / _LANE_BITS)
        for loop in record.loops
        for name, n in loop.counts.items()
        if name.startswith(("LDL.", "STL."))
    )
    return lanes * record.warps / record.edges


def per_edge_and_channel(record: Record, name: str) -> float:
    """How often an instruction runs, all lanes together, for each element of a block's tile."""
    if not record.loops:
        return 0.0
    tile = record.edges * padded(record.configuration.hidden)
    return sum(loop.counts.get(name, 0) for loop in record.loops) * record.warps * WARP / tile


def write(records: Sequence[Record], path: Path) -> None:
    """The file: an object with the compilers' versions and a row for each kernel."""
    rows = ",\n".join(" " + json.dumps(summary(record)) for record in records)
    ptxas = {r.configuration.arch: r.assembler for r in records if r.assembler}
    head = f'"schema": 1, "triton": {json.dumps(records[0].triton)}, "ptxas": {json.dumps(ptxas)}'
    write_atomic(path, f'{{{head}, "kernels": [\n{rows}\n]}}\n'.encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile and write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.offline", description="Compile every shipped kernel without a GPU."
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file that is written")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=NVIDIA)
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="of the compiler"
    )
    args = parser.parse_args(arguments)
    records = compile_all(list(shipped(args.arch)), args.processes)
    write(records, args.out)
    for row in map(summary, records):
        if row["stack"]:
            print(*(f"{k}={v}" for k, v in row.items()))
    for record in records:
        for hazard in record.hazards:
            print(f"{record.configuration.label}: {hazard}")
    print(f"{len(records)} kernels: {args.out}")


if __name__ == "__main__":
    main()
