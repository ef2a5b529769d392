"""What a call would have compiled: kernels, their arguments and constants; what is shipped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from egnn_fast.kernels.backward import edge_backward
from egnn_fast.kernels.blocks import (
    Blocks,
    blocks_for,
    node_blocks,
    sender_block,
    sender_options,
)
from egnn_fast.kernels.forward import edge_forward
from egnn_fast.kernels.gradients import Cotangents, Gradients
from egnn_fast.kernels.nodes import (
    PACKED_ROWS,
    PROJECTED,
    NodeOutputs,
    Nodes,
    NodeSizes,
    NodeWeights,
    pack_weights,
    project_nodes,
    update_nodes,
)
from egnn_fast.kernels.records import (
    EdgeList,
    Inputs,
    Numbers,
    Order,
    Rows,
    Spec,
    Weights,
    only,
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
# the edge kernels have loops over blocks of edges, and rows in the tables of blocks
NODE_KERNELS = ("project_nodes", "update_nodes", "pack_weights")
KERNELS = (
    "edge_forward", "edge_backward", "sender_sums", "finish_rows", *STAGED_KERNELS, *NODE_KERNELS,
)  # fmt: skip
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
    velocity : kernels over nodes: whether nodes have velocities
    few : the same: whether there are few nodes, for which tiles are small
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
    velocity: bool = False
    few: bool = False
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
        forward = (*PASSES["forward"], *NODE_KERNELS)
        return "forward" if self.kernel in forward else "backward"

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
        if self.kernel in NODE_KERNELS:
            return 4 if self.kernel == "pack_weights" else self._node_blocks[2]
        if self.kernel == "finish_rows":
            return 1 if self.hidden <= 64 else 4
        return (
            sender_options(False)["num_warps"] if self.kernel == "sender_sums" else self.row.warps
        )

    @property
    def edges(self) -> int:
        """Edges of a block, or nodes of a tile; 0 where there are none."""
        if self.kernel in NODE_KERNELS:
            return 0 if self.kernel == "pack_weights" else self._node_blocks[0]
        sizes = {"finish_rows": 0, "sender_sums": sender_block(padded(self.hidden))}
        return sizes.get(self.kernel, self.row.edges)

    @property
    def _node_blocks(self) -> tuple[int, int, int]:
        return node_blocks(padded(self.hidden), self.precision, self.few, self.arch)

    @property
    def label(self) -> str:
        """What distinguishes it, in a line."""
        given = {k: v for k, v in asdict(self).items() if v != getattr(Configuration, k, None)}
        extra = [k if v is True else f"{k}={v}" for k, v in given.items() if k not in _NAMED]
        named = (self.kernel, self.arch, f"H={self.hidden}", self.precision)
        return " ".join((*named, *extra))


_NAMED = ("kernel", "arch", "hidden", "precision")


class _Address:
    """Stands for a tensor: aligned to 16 bytes, and longer than 2 GB."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 0

    def ptr_range(self) -> int:
        return 1 << 40


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
    if c.kernel in NODE_KERNELS:
        return _node_arguments(c, spec)
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
        rows = (out, out if c.head else None)
        return edge_forward, (*shared, *rows, *run, spec.read_by(c.kernel)), options
    gradients = Gradients(
        p=out, receiver=out, sender=f32, edge_attr=attr, edge_mask=None,
        messages=f32 if c.ordered else None, shifts=f32 if c.ordered else None, weights=f32,
    )  # fmt: skip
    cotangents = Cotangents(f32, head)
    if c.kernel == "edge_backward":
        own = (cotangents, gradients)
        return edge_backward, (*shared, *own, *run, spec.read_by(c.kernel)), options
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
    stage, given = stages[c.kernel]
    return stage, (*shared, *given, *run, spec.read_by(c.kernel)), options


def _node_arguments(c: Configuration, spec: Spec) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Those of a kernel over nodes: a layer with as many features as hidden units."""
    f32, width, own = _Address(torch.float32), c.width, c.hidden
    read = spec.read_by(c.kernel)
    operand = _Address({"bf16": torch.bfloat16, "fp16": torch.float16}.get(c.precision, f32.dtype))
    head, first = f32 if c.head else None, 2 * own + 1 + c.attrs
    if c.kernel == "pack_weights":
        wider, changed = own != width, operand if operand.dtype != f32.dtype else None
        if spec.ROUND.value:
            changed = f32
        columns = (f32, first, *((f32, first) if c.attrs else (None, 0)))
        padding = f32 if wider else None
        out = Weights(
            w_r=f32, w_a=f32 if c.attrs else None, w2=changed, b2=padding, w_g=None, b_g=None,
            w3=changed if c.head else None, b3=padding if c.head else None,
            w_x=padding if c.head else None,
        )  # fmt: skip
        # those that are packed; w_r and w_a come beside them
        given = Weights(*(None if t is None else f32 for t in out))._replace(w_r=None, w_a=None)
        sizes = (own, width, c.attrs)
        keywords = {"spec": read, "ROWS": PACKED_ROWS}
        return pack_weights, (given, *columns, out, *sizes), keywords
    tile, chunk, warps = c._node_blocks
    options, layer = {"num_warps": warps}, NodeSizes.of(own, own, own, 0, tile, chunk, True)
    if c.kernel == "project_nodes":
        args = (f32, f32, f32, first, operand, f32, head, _EDGES, only(layer, PROJECTED), read)
        return project_nodes, args, options
    v, moved = f32 if c.velocity else None, f32 if c.head or c.velocity else None
    return update_nodes, (
        Nodes(f32, f32, v, None, f32), f32, head, NodeWeights(f32, f32, f32, f32, v, v, v, v),
        NodeOutputs(f32, moved, None), Numbers(0.01, c.norm, c.clamp), 1.0, _EDGES, layer, read,
    ), options  # fmt: skip


def shipped(archs: Sequence[str] = NVIDIA) -> Iterator[Configuration]:
    """Each row of the table at every width that it serves, with the sums that go with them."""
    for arch in archs:
        for hidden in (*SHIPPED_WIDTHS, WIDE_WIDTH):
            for direction, (fused, *stages) in PASSES.items():
                for precision in ("bf16", "fp16", "high", "highest"):
                    row = blocks_for(direction, precision, padded(hidden), arch)
                    for kernel in stages if row.staged else [fused]:
                        yield Configuration(kernel, arch, hidden, precision=precision)
            for kernel in ("sender_sums", "finish_rows", "pack_weights"):
                yield Configuration(kernel, arch, hidden)
            for kernel, precision, few in itertools.product(
                ("project_nodes", "update_nodes"), ("bf16", "high", "highest"), (True, False)
            ):
                yield Configuration(kernel, arch, hidden, precision=precision, few=few)


def with_options(c: Configuration) -> Iterator[Configuration]:
    """The same kernel with options that change its code."""
    yield replace(c, head=False)
    yield replace(c, complete=True)
    head = replace(c, attention=True, norm=1.0, tanh=True, clamp=100.0)
    ordered = c.kernel == "edge_backward"
    yield replace(head, attrs=2, permuted=True, mask=True, ordered=ordered)
