"""Compiles the kernels for a GPU that is not there, and reads what came of it.

``python -m egnn_fast.kernels.offline --json FILE`` (``-`` for standard input) takes a list of
configurations, objects with the fields of :class:`Configuration`, and prints a list of records,
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from egnn_fast.kernels import interpreting
from egnn_fast.kernels.backward import edge_backward
from egnn_fast.kernels.blocks import Blocks, blocks_for, sender_block, sender_options
from egnn_fast.kernels.disassembly import (
    Loop,
    amdgcn_record,
    block_loops,
    counts_of,
    instructions_of,
    macs_by_type,
)
from egnn_fast.kernels.forward import edge_forward
from egnn_fast.kernels.gradients import Cotangents, Gradients
from egnn_fast.kernels.records import (
    EdgeList,
    Inputs,
    Numbers,
    Order,
    Rows,
    Spec,
    Weights,
    padded,
    row_width,
)
from egnn_fast.kernels.staged import staged_first, staged_messages, staged_shifts
from egnn_fast.kernels.staged_backward import (
    staged_first_backward,
    staged_messages_backward,
    staged_shifts_backward,
)
from egnn_fast.kernels.sums import finish_rows, sender_sums

_FORWARD = ("staged_first", "staged_messages", "staged_shifts")
_BACKWARD = ("staged_shifts_backward", "staged_messages_backward", "staged_first_backward")
STAGED_KERNELS = (*_FORWARD, *_BACKWARD)
# a pass is one kernel, or several in stages
PASSES = {"forward": ("edge_forward", *_FORWARD), "backward": ("edge_backward", *_BACKWARD)}
KERNELS = ("edge_forward", "edge_backward", "sender_sums", "finish_rows", *STAGED_KERNELS)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = tuple(name for name, target in TARGETS.items() if target.backend == "cuda")
# bytes that one program may have; compute capabilities in the CUDA C++ Programming Guide, CDNA 3
SHARED_LIMIT = {
    "sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
    "sm_120": 99 << 10, "gfx942": 64 << 10,
}  # fmt: skip
SHIPPED_WIDTHS, WIDE_WIDTH = (16, 32, 64, 128), 256
_EDGES = 1_000_003  # a number that no specialisation holds for


@dataclass(frozen=True)
class Configuration:
    """A kernel as a call would have it compiled.

    Attributes
    ----------
    kernel : one of ``KERNELS``
    arch : one of ``TARGETS``
    hidden, dim, attrs : H, D and A
    precision : "highest", "high", "bf16" or "fp16"
    activation, attention, norm, tanh, clamp : the layer's options, as the operator has them
    head : whether there is a coordinate head (backward: and a gradient of its output)
    mask : whether edges have a mask
    complete : complete components, no edge list
    permuted : the user's edges are in another order
    ordered : backward: each edge's gradients are kept for sums in the order of edges
    blocks : how it is launched; None: the row of the table
    """

    kernel: str
    arch: str = "sm_90"
    hidden: int = 64
    dim: int = 3
    attrs: int = 0
    precision: str = "bf16"
    activation: str = "silu"
    attention: bool = False
    norm: float = 0.0
    tanh: bool = False
    clamp: float = 0.0
    head: bool = True
    mask: bool = False
    complete: bool = False
    permuted: bool = False
    ordered: bool = False
    blocks: Blocks | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("kernel", self.kernel, KERNELS), ("arch", self.arch, TARGETS)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if self.blocks is not None and not isinstance(self.blocks, Blocks):  # JSON knows no tuples
            object.__setattr__(self, "blocks", Blocks(*self.blocks))

    @property
    def direction(self) -> str:
        """The pass that it belongs to."""
        return "forward" if self.kernel in PASSES["forward"] else "backward"

    @property
    def row(self) -> Blocks:
        """How it is launched."""
        if self.blocks is not None:
            return self.blocks
        return blocks_for(self.direction, self.precision, padded(self.hidden), self.arch)

    @property
    def width(self) -> int:
        """Channels of what it is given."""
        return row_width(self.hidden, self.row.staged)

    @property
    def warps(self) -> int:
        """Warps of a program."""
        if self.kernel == "finish_rows":
            return 1 if self.hidden <= 64 else 4
        return (
            sender_options(False)["num_warps"] if self.kernel == "sender_sums" else self.row.warps
        )

    @property
    def edges(self) -> int:
        """Edges of a block; 0 where there are none."""
        sizes = {"finish_rows": 0, "sender_sums": sender_block(padded(self.hidden))}
        return sizes.get(self.kernel, self.row.edges)

    @property
    def label(self) -> str:
        """What distinguishes it, in a line."""
        given = {k: v for k, v in asdict(self).items() if v != getattr(Configuration, k, None)}
        extra = [k if v is True else f"{k}={v}" for k, v in given.items() if k not in _NAMED]
        named = (self.kernel, self.arch, f"H={self.hidden}", self.precision)
        return " ".join((*named, *extra))


_NAMED = ("kernel", "arch", "hidden", "precision")


@dataclass(frozen=True)
class Record:
    """What a configuration was compiled to.

    Attributes
    ----------
    configuration : which
    warps, edges : warps of a program, edges of a block (0: no blocks)
    registers, stack : of a thread; bytes, which is where spilled registers go
    shared : bytes of shared memory of a program
    counts : instructions by class, each warp's
    macs : multiply-adds of matrix instructions, by instruction and type
    loops : the loop over blocks, and those in it; none for AMD
    spilled_registers : AMD's; NVIDIA tells the stack alone
    triton : the compiler's version
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

    @classmethod
    def read(cls, found: dict[str, Any]) -> Record:
        """From an object of the command's JSON."""
        loops = [Loop(**loop) for loop in found.pop("loops")]
        return cls(Configuration(**found.pop("configuration")), loops=loops, **found)


class ToolMissing(RuntimeError):
    """A program of Triton's package is not there."""


class _Address:
    """Stands for a tensor: aligned to 16 bytes, and longer than 2 GB."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 0

    def ptr_range(self) -> int:
        return 1 << 40


class _NoDevice:
    """A driver that only says for what to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> tuple[str, Any]:
        return self.target.backend, self.target.arch

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def arguments(c: Configuration) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """``(kernel, arguments, keywords)`` of the launch, with what stands for tensors."""
    f32, i32, i64 = (_Address(t) for t in (torch.float32, torch.int32, torch.int64))
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(c.precision)
    operand = f32 if half is None else _Address(half)
    row, width, dim = c.row, c.width, c.dim
    nvidia = TARGETS[c.arch].backend == "cuda"
    options = row.launch_options(c.direction, nvidia)
    spec = Spec.make(
        hidden=width, dim=dim, attrs=c.attrs, precision=c.precision, activation=c.activation,
        norm=c.norm, tanh=c.tanh, clamp=c.clamp, blocks=row,
        nvidia=nvidia, staged=c.kernel in STAGED_KERNELS,
    )  # fmt: skip
    out = Rows(f32, f32)
    if c.kernel == "finish_rows":
        b, b_width = (out, dim) if c.head else (None, 0)
        strides = (width, width, b, b_width, b_width)
        tiles = {"A": triton.next_power_of_2(width), "B": triton.next_power_of_2(b_width)}
        return finish_rows, (i32, 4 * 33, out, *strides), {**tiles, "num_warps": c.warps}
    blocks = -(-_EDGES // c.edges)
    if c.kernel == "sender_sums":
        args = (i32, Order(None, i32), i32, _EDGES, blocks, f32, out, 2 * width, f32, out)
        sizes = {"H": width, "D": dim, "HP": spec.HP, "DP": spec.DP, "BLOCK": c.edges}
        return sender_sums, args, {**sizes, "PART": spec.PART.value, **sender_options(nvidia)}
    listed = not c.complete and c.kernel not in STAGED_KERNELS
    edges = EdgeList(
        order=Order(None, i32) if listed and c.direction == "forward" else Order(i64, None),
        receivers=i32 if listed else None, senders=None if c.complete else i32,
        perm=i32 if c.permuted and not c.complete else None, first=i32 if c.complete else None,
        block_rows=i32,
    )  # fmt: skip
    attr = f32 if c.attrs else None
    gate, head = (f32 if c.attention else None), (f32 if c.head else None)
    inputs = Inputs(operand, f32, attr, f32 if c.mask else None)
    weights = Weights(
        w_r=f32, w_a=attr, w2=operand, b2=f32, w_g=gate, b_g=gate,
        w3=operand if c.head else None, b3=head, w_x=head,
    )  # fmt: skip
    numbers = Numbers(0.01, c.norm, c.clamp)
    shared, run = (edges, inputs, weights, numbers), (0, _EDGES, blocks)
    if c.kernel == "edge_forward":
        return edge_forward, (*shared, out, out if c.head else None, *run, spec), options
    gradients = Gradients(
        p=out, receiver=out, sender=f32, edge_attr=attr, edge_mask=None,
        messages=f32 if c.ordered else None, shifts=f32 if c.ordered else None, weights=f32,
    )  # fmt: skip
    cotangents = Cotangents(f32, head)
    if c.kernel == "edge_backward":
        return edge_backward, (*shared, cotangents, gradients, *run, spec), options
    tile = operand
    stages: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "staged_first": (staged_first, (tile, None)),
        "staged_messages": (staged_messages, (tile, tile if c.head else None, out)),
        "staged_shifts": (staged_shifts, (tile, out)),
        "staged_shifts_backward": (
            staged_shifts_backward, (cotangents, gradients, tile, f32, None),
        ),
        "staged_messages_backward": (
            staged_messages_backward, (cotangents, gradients, tile, tile if c.head else None, None),
        ),
        "staged_first_backward": (staged_first_backward, (gradients, tile, None, head)),
    }  # fmt: skip
    stage, own = stages[c.kernel]
    return stage, (*shared, *own, *run, spec), options


def compile_here(c: Configuration) -> Record:
    """Compile a configuration in this process, whose Triton can then no longer launch kernels."""
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: kernels are not compiled in this process")
    driver.set_active(_NoDevice(TARGETS[c.arch]))
    kernel, args, keywords = arguments(c)
    found = kernel.warmup(*args, grid=(1,), **keywords)
    shape: dict[str, Any] = {"configuration": c, "warps": c.warps, "edges": c.edges}
    if "amdgcn" in found.asm:
        return Record(**shape, shared=found.metadata.shared, **amdgcn_record(found.asm["amdgcn"]))
    usage, sass = _dump(found.asm["cubin"])
    lines = instructions_of(sass)
    return Record(
        **shape, registers=_stated("REG", usage), stack=_stated("STACK", usage),
        shared=found.metadata.shared, counts=counts_of(lines), macs=macs_by_type(lines),
        loops=block_loops(lines),
    )  # fmt: skip


def _stated(name: str, usage: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump told no {name}: {usage[:200]!r}")
    return int(found[1])


def _dump(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump tells of a compiled kernel: its resources, its instructions."""
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
        If one of them could not be compiled, with what its process wrote.
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
    most = max(1, min(4, -(-len(configurations) // processes)))
    parts = [configurations[i : i + most] for i in range(0, len(configurations), most)]
    with ThreadPoolExecutor(processes) as pool:
        return [record for records in pool.map(run, parts) for record in records]


def shipped(archs: Sequence[str] = NVIDIA) -> Iterator[Configuration]:
    """Each row of the table at every width that it serves, with the sums that go with them."""
    for arch in archs:
        for hidden in (*SHIPPED_WIDTHS, WIDE_WIDTH):
            for direction, (fused, *stages) in PASSES.items():
                for precision in ("bf16", "fp16", "high", "highest"):
                    row = blocks_for(direction, precision, padded(hidden), arch)
                    for kernel in stages if row.staged else [fused]:
                        yield Configuration(kernel, arch, hidden, precision=precision)
            for kernel in ("sender_sums", "finish_rows"):
                yield Configuration(kernel, arch, hidden)


def with_options(c: Configuration) -> Iterator[Configuration]:
    """The same kernel with options that change its code."""
    yield replace(c, head=False)
    yield replace(c, complete=True)
    head = replace(c, attention=True, norm=1.0, tanh=True, clamp=100.0)
    ordered = c.kernel == "edge_backward"
    yield replace(head, attrs=2, permuted=True, mask=True, ordered=ordered)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile the configurations of a JSON file, print the records."""
    parser = argparse.ArgumentParser(description="Compile the kernels without a GPU.")
    parser.add_argument("--json", required=True, metavar="FILE", help="configurations, - for stdin")
    file = parser.parse_args(arguments).json
    wanted = json.loads(sys.stdin.read() if file == "-" else Path(file).read_text())
    records = [asdict(compile_here(Configuration(**each))) for each in wanted]
    json.dump(records, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
