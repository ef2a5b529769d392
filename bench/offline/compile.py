"""Compiles kernels for a GPU that need not be there, and reads the machine code.

``python -m bench.offline.compile --json FILE`` (``-`` for standard input) takes a list of
configurations, objects with the fields of
:class:`~bench.offline.configurations.Configuration`, and prints a list of records,
objects with the fields of :class:`Record`. Triton reads ``TRITON_INTERPRET`` when a kernel is
defined, and its driver is replaced here: :func:`compile_all` runs this command in processes of its
own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.offline.configurations import TARGETS, Configuration, arguments
from bench.offline.disassembly import (
    Loop,
    amdgcn_record,
    block_loops,
    code_hash,
    counts_of,
    instructions_of,
    macs_by_type,
)
from bench.offline.hazards import hazards
from egnn_fast.kernels import interpreting
from egnn_fast.kernels.assembler import in_use


@dataclass(frozen=True)
class Record:
    """The machine code of a configuration.

    Attributes
    ----------
    configuration : what was compiled
    warps, edges : warps of a program, edges of a block (0: no blocks)
    registers, stack : of a thread; the stack, in bytes, is where spilled registers go
    shared : bytes of shared memory of a program
    counts : instructions by class, of a warp
    macs : multiply-adds of matrix instructions, by instruction and type
    loops : the loop over blocks, and those in it; none for AMD
    spilled_registers : on AMD; on NVIDIA only the stack is known
    triton : version of Triton
    assembler : version of ptxas, in full; none for AMD
    code : :func:`~bench.offline.disassembly.code_hash`; none for AMD
    hazards : :func:`~bench.offline.hazards.hazards`
    """

    configuration: Configuration
    warps: int
    edges: int
    registers: int
    stack: int
    shared: int
    counts: dict[str, int]
    macs: dict[str, int] = field(default_factory=dict)
    loops: list[Loop] = field(default_factory=list)
    spilled_registers: int = 0
    triton: str = triton.__version__
    assembler: str = ""
    code: str = ""
    hazards: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, found: dict[str, Any]) -> Record:
        """From an object of the command's JSON."""
        loops = [Loop(**loop) for loop in found.pop("loops")]
        return cls(Configuration(**found.pop("configuration")), loops=loops, **found)


class ToolMissing(RuntimeError):
    """An executable, such as cuobjdump, is missing in Triton's package."""


class _NoDevice:
    """A driver without a device: it only tells Triton the target."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> tuple[str, Any]:
        return self.target.backend, self.target.arch

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def compile_here(c: Configuration) -> Record:
    """Compile a configuration in this process, whose Triton can then no longer launch kernels."""
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: kernels are not compiled in this process")
    target = TARGETS[c.arch]
    driver.set_active(_NoDevice(target))
    kernel, args, keywords = arguments(c)
    compiled = kernel.warmup(*args, grid=(1,), **keywords)
    shape: dict[str, Any] = {"configuration": c, "warps": c.warps, "edges": c.edges}
    if "amdgcn" in compiled.asm:
        return Record(
            **shape, shared=compiled.metadata.shared, **amdgcn_record(compiled.asm["amdgcn"])
        )
    cubin = compiled.asm["cubin"]
    usage, sass = _dump(cubin)
    lines, assembler = instructions_of(sass), in_use(target.arch)
    return Record(
        **shape, registers=_stated("REG", usage), stack=_stated("STACK", usage),
        shared=compiled.metadata.shared, counts=counts_of(lines), macs=macs_by_type(lines),
        loops=block_loops(lines), assembler=assembler.version if assembler else "",
        code=code_hash(cubin), hazards=hazards(lines),
    )  # fmt: skip


def _stated(name: str, usage: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no {name}: {usage[:200]!r}")
    return int(found[1])


def _dump(cubin: bytes) -> tuple[str, str]:
    """``(resources, instructions)`` of a compiled kernel, as cuobjdump prints them."""
    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except (AttributeError, RuntimeError) as error:
        raise ToolMissing(f"cuobjdump is not in Triton's package: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        texts = []
        for option in ("--dump-resource-usage", "--dump-sass"):
            ran = subprocess.run([tool, option, str(file)], capture_output=True, text=True)
            if ran.returncode:
                raise RuntimeError(f"{tool} {option} failed: {ran.stderr.strip()}")
            texts.append(ran.stdout)
    return texts[0], texts[1]


def compile_all(
    configurations: Sequence[Configuration], processes: int = 1, cache: str | Path | None = None
) -> list[Record]:
    """Compile configurations in processes of their own; the records in the same order.

    Raises
    ------
    RuntimeError
        If one of them could not be compiled, with the output of its process.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)

    def run(part: Sequence[Configuration]) -> list[Record]:
        ran = subprocess.run(
            [sys.executable, "-m", __name__, "--json", "-"], capture_output=True, text=True,
            input=json.dumps([asdict(c) for c in part]), env=environment,
        )  # fmt: skip
        if ran.returncode:
            labels = "; ".join(c.label for c in part)
            raise RuntimeError(f"compiling failed: {labels}\n{ran.stderr[-3000:]}")
        return [Record.read(found) for found in json.loads(ran.stdout)]

    # several to a process, whose start takes seconds; few, as some take far longer than others
    most = max(1, min(8, -(-len(configurations) // processes)))
    parts = [configurations[i : i + most] for i in range(0, len(configurations), most)]
    with ThreadPoolExecutor(processes) as pool:
        return [record for records in pool.map(run, parts) for record in records]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile the configurations of a JSON file, print the records."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.offline.compile", description="Compile kernels without a GPU."
    )
    parser.add_argument("--json", required=True, metavar="FILE", help="configurations, - for stdin")
    file = parser.parse_args(arguments).json
    wanted = json.loads(sys.stdin.read() if file == "-" else Path(file).read_text())
    records = [asdict(compile_here(Configuration(**each))) for each in wanted]
    json.dump(records, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
