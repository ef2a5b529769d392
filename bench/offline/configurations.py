"""The kernels as a call would have them compiled, and those that are shipped.

What is compiled is taken from the launchers in kernels/, which are called with addresses of no
memory while launches are recorded: no list of arguments is repeated here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from egnn_fast.kernels import backward, forward, nodes, staged, staged_backward, sums
from egnn_fast.kernels.blocks import (
    Blocks,
    blocks_for,
    node_blocks,
    sender_block,
    sender_options,
)
from egnn_fast.kernels.gradients import Cotangents, Gradients
from egnn_fast.kernels.nodes import LayerSizes, NodeOutputs, Nodes, NodeWeights
from egnn_fast.kernels.records import (
    Chunk,
    EdgeList,
    Inputs,
    LayerOptions,
    Order,
    Plan,
    Problem,
    Rows,
    Weights,
    padded,
    row_width,
)

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
_NODES = _EDGES = 1_000_003  # no multiple of 16, for which Triton compiles a kernel of its own


@dataclass(frozen=True)
class Configuration:
    """A kernel as a call would have it compiled.

    Attributes
    ----------
    kernel : one of ``KERNELS``
    arch : one of ``TARGETS``
    hidden, dim, attrs : H, D and A
    precision : "highest", "high", "bf16" or "fp16"
    options : the layer's options, as the operator has them; a mapping of some of them will do
    attention : whether messages have a gate
    head : whether there is a coordinate head (backward: and a gradient of its output)
    mask : whether edges have a mask
    complete : whether components are complete, without an edge list
    permuted : whether the user's edges are in another order
    ordered : backward: whether each edge's gradients are stored, for sums in the order of edges
    velocity : kernels over nodes: whether nodes have velocities
    few : the same: whether there are few nodes, for which tiles are small
    blocks : block sizes; None: those of the table
    """

    kernel: str
    arch: str = "sm_90"
    hidden: int = 64
    dim: int = 3
    attrs: int = 0
    precision: str = "bf16"
    options: LayerOptions = field(default_factory=LayerOptions)
    attention: bool = False
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
        # JSON knows neither tuples nor classes
        if self.blocks is not None and not isinstance(self.blocks, Blocks):
            object.__setattr__(self, "blocks", Blocks(*self.blocks))
        if isinstance(self.options, Mapping):
            object.__setattr__(self, "options", LayerOptions(**self.options))

    @property
    def direction(self) -> str:
        """The pass that it belongs to."""
        forward = (*PASSES["forward"], *NODE_KERNELS)
        return "forward" if self.kernel in forward else "backward"

    @property
    def row(self) -> Blocks:
        """Its block sizes."""
        if self.blocks is not None:
            return self.blocks
        return blocks_for(self.direction, self.precision, padded(self.hidden), self.arch)

    @property
    def width(self) -> int:
        """How many channels its arguments have."""
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
        changed = _changed(self.options)
        changed |= {k: v for k, v in _changed(self).items() if k not in (*_NAMED, "options")}
        extra = [k if v is True else f"{k}={v}" for k, v in changed.items()]
        return " ".join((self.kernel, self.arch, f"H={self.hidden}", self.precision, *extra))

    @property
    def plan(self) -> Plan:
        """How a call would have it compiled and launched."""
        return Plan.make(
            self.direction, self.row, self.options, hidden=self.width, dim=self.dim,
            attrs=self.attrs, precision=self.precision, arch=self.arch,
            nvidia=TARGETS[self.arch].backend == "cuda",
        )  # fmt: skip


_NAMED = ("kernel", "arch", "hidden", "precision")


def _changed(record: Any) -> dict[str, Any]:
    """The fields of a dataclass that do not have their defaults."""
    values = {f.name: (f.default, getattr(record, f.name)) for f in fields(record)}
    return {name: value for name, (default, value) in values.items() if value != default}


class _Address:
    """Stands for a dense tensor: aligned to 16 bytes, and longer than 2 GB."""

    def __init__(self, dtype: torch.dtype, *shape: int) -> None:
        self.dtype, self.shape = dtype, shape

    def data_ptr(self) -> int:
        return 0

    def ptr_range(self) -> int:
        return 1 << 40

    def stride(self, axis: int) -> int:
        stride = 1
        for size in self.shape[axis + 1 :]:
            stride *= size
        return stride


class Launch(NamedTuple):
    """What a launcher asked Triton to run."""

    kernel: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside the block kernels do not run: their launches are written down."""
    launches: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(Launch(self, args, keywords))

    kinds: tuple[Any, ...] = (JITFunction, InterpretedFunction)
    before = [kind.run for kind in kinds]
    for kind in kinds:
        kind.run = note
    try:
        yield launches
    finally:
        for kind, run in zip(kinds, before, strict=True):
            kind.run = run


def kernel_functions() -> dict[str, Any]:
    """Every kernel, by its name."""
    modules = (forward, backward, staged, staged_backward, sums, nodes)
    members = {k: v for module in modules for k, v in vars(module).items()}
    return {name: members[name] for name in KERNELS}


def arguments(c: Configuration) -> Launch:
    """The launch of a kernel, with addresses that stand for tensors."""
    with recorded() as launches:
        _LAUNCHERS[c.kernel](c, c.plan)
    (launch,) = launches
    return launch


_F32, _I32, _I64 = (_Address(t) for t in (torch.float32, torch.int32, torch.int64))
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CHUNK = {"begin": 0, "end": _EDGES, "programs": 1}


def _operand(c: Configuration) -> _Address:
    """A tensor of the products' operands."""
    return _Address(_HALVES.get(c.precision, torch.float32))


def _rows(width: int) -> Rows:
    return Rows(_Address(torch.float32, _NODES, width), _F32)


def _chunk(c: Configuration) -> Chunk:
    return Chunk(blocks=-(-_EDGES // c.edges), **_CHUNK)


def _problem(c: Configuration) -> Problem:
    listed = not c.complete and c.kernel not in STAGED_KERNELS
    edges = EdgeList(
        order=Order(None, _I32) if listed and c.direction == "forward" else Order(_I64, None),
        receivers=_I32 if listed else None, senders=None if c.complete else _I32,
        perm=_I32 if c.permuted and not c.complete else None, first=_I32 if c.complete else None,
        block_rows=_I32,
    )  # fmt: skip
    attr, head = (_F32 if c.attrs else None), (_F32 if c.head else None)
    gate, operand = (_F32 if c.attention else None), _operand(c)
    weights = Weights(
        w_r=_F32, w_a=attr, w2=operand, b2=_F32, w_g=gate, b_g=gate,
        w3=operand if c.head else None, b3=head, w_x=head,
    )  # fmt: skip
    inputs = Inputs(operand, _F32, attr, _F32 if c.mask else None)
    return Problem(edges, inputs, weights, c.options.numbers)


def _edge_forward(c: Configuration, plan: Plan) -> None:
    x = _rows(c.dim) if c.head else None
    forward.launch_edge_forward(plan, _problem(c), _rows(c.width), x, _chunk(c))


def _backward(c: Configuration) -> tuple[Cotangents, Gradients]:
    ordered = _F32 if c.ordered else None
    gradients = Gradients(
        p=_rows(c.width), receiver=_rows(c.dim), sender=_F32, edge_attr=_F32 if c.attrs else None,
        edge_mask=None, messages=ordered, shifts=ordered, weights=_F32,
    )  # fmt: skip
    return Cotangents(_F32, _F32 if c.head else None), gradients


def _edge_backward(c: Configuration, plan: Plan) -> None:
    backward.launch_edge_backward(plan, _problem(c), *_backward(c), _chunk(c))


def _stage(
    launcher: Callable[..., None], own: Callable[[Configuration], tuple[Any, ...]]
) -> Callable[[Configuration, Plan], None]:
    """The launch of a stage; ``own`` are its arguments between problem and chunk."""
    return lambda c, plan: launcher(plan, _problem(c), *own(c), _chunk(c))


def _head_tile(c: Configuration) -> _Address | None:
    return _operand(c) if c.head else None


def _finish_rows(c: Configuration, plan: Plan) -> None:
    b = _rows(c.dim) if c.head else None
    sums.launch_finish_rows(plan, _Address(torch.int32, 4 * 33), _rows(c.width), b)


def _sender_sums(c: Configuration, plan: Plan) -> None:
    senders = sums.SenderEdges(_I32, _I32, _I32)
    rows = (_rows(c.width), _rows(c.dim))
    sums.launch_sender_sums(plan, senders, _F32, _F32, *rows, _chunk(c))


def _layer_sizes(c: Configuration) -> LayerSizes:
    """A layer with as many features as hidden units."""
    return LayerSizes(_NODES, c.hidden, c.hidden, c.hidden, 0, residual=True, few=c.few)


def _edge_w1(c: Configuration) -> _Address:
    return _Address(torch.float32, c.hidden, 2 * c.hidden + 1 + c.attrs)


def _project_nodes(c: Configuration, plan: Plan) -> None:
    head = _F32 if c.head else None
    args = (_F32, _edge_w1(c), _F32, _operand(c), _F32, head)
    nodes.launch_project_nodes(plan, _layer_sizes(c), *args)


def _update_nodes(c: Configuration, plan: Plan) -> None:
    v, moved = _F32 if c.velocity else None, _F32 if c.head or c.velocity else None
    nodes.launch_update_nodes(
        plan, _layer_sizes(c), Nodes(_F32, _F32, v, None, _F32), _F32, _F32 if c.head else None,
        NodeWeights(_F32, _F32, _F32, _F32, v, v, v, v), NodeOutputs(_F32, moved, None),
        c.options.numbers, 1.0,
    )  # fmt: skip


def _pack_weights(c: Configuration, plan: Plan) -> None:
    """Packs a layer's weights; w_r and w_a are columns of edge_w1, so they are always packed."""
    operand = _operand(c)
    rounded = operand.dtype != torch.float32 or plan.spec.ROUND.value
    matrix, padding = operand if rounded else None, _F32 if c.hidden != c.width else None
    head = c.head or None
    out = Weights(
        w_r=_F32, w_a=_F32 if c.attrs else None, w2=matrix, b2=padding, w_g=None, b_g=None,
        w3=head and matrix, b3=head and padding, w_x=head and padding,
    )  # fmt: skip
    w2 = _Address(torch.float32, c.hidden, c.hidden)
    columns = _Address(torch.float32, c.hidden, c.attrs)
    columns.stride = _edge_w1(c).stride  # type: ignore[method-assign]
    source = Weights(columns, columns, w2, _F32, None, None, _F32, _F32, _F32)
    nodes.launch_pack_weights(plan, source, out)


_LAUNCHERS: dict[str, Callable[[Configuration, Plan], None]] = {
    "edge_forward": _edge_forward,
    "edge_backward": _edge_backward,
    "sender_sums": _sender_sums,
    "finish_rows": _finish_rows,
    "staged_first": _stage(staged.launch_staged_first, lambda c: (_operand(c), None)),
    "staged_messages": _stage(
        staged.launch_staged_messages, lambda c: (_operand(c), _head_tile(c), _rows(c.width))
    ),
    "staged_shifts": _stage(staged.launch_staged_shifts, lambda c: (_operand(c), _rows(c.dim))),
    "staged_shifts_backward": _stage(
        staged_backward.launch_staged_shifts_backward,
        lambda c: (*_backward(c), _operand(c), _F32, None),
    ),
    "staged_messages_backward": _stage(
        staged_backward.launch_staged_messages_backward,
        lambda c: (*_backward(c), _operand(c), _head_tile(c), None),
    ),
    "staged_first_backward": _stage(
        staged_backward.launch_staged_first_backward,
        lambda c: (_backward(c)[1], _operand(c), None, _F32 if c.head else None),
    ),
    "project_nodes": _project_nodes,
    "update_nodes": _update_nodes,
    "pack_weights": _pack_weights,
}


def shipped(archs: Sequence[str] = NVIDIA) -> Iterator[Configuration]:
    """Each row of the table at every width that takes it, and the kernels around the edge pass."""
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
    options = replace(c.options, coord_norm=1.0, coord_tanh=True, coord_clamp=100.0)
    ordered = c.kernel == "edge_backward"
    yield replace(
        c, options=options, attention=True, attrs=2, permuted=True, mask=True, ordered=ordered
    )
