"""Arguments of the kernels: records of addresses, and the constants that they are compiled for.

Triton's compiler takes a named tuple apart: a record costs nothing, in registers or otherwise.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from egnn_fast.kernels import APPROXIMATE, interpreting
from egnn_fast.kernels.blocks import Blocks

ACTIVATIONS = {"silu": 0, "relu": 1, "leaky_relu": 2}
OPERANDS = {"bf16": tl.bfloat16, "fp16": tl.float16}  # float32 in other precisions
# what holds 8 bits of mantissa; the interpreter's bfloat16 is wrong
PART = tl.float32 if interpreting() else tl.bfloat16
# the gradients of the weights that are vectors: the rows of the tile in which they are summed
VECTORS = ("w_r", "b2", "b3", "w_x", "w_g")


# edge attributes that the kernels take: their matrix's gradient shares a tile with those of VECTORS
VECTOR_COLUMNS = 16
MAX_ATTRS = VECTOR_COLUMNS - len(VECTORS)


def padded(width: int) -> int:
    """The width of a tile: a power of 2 that the matrix units take."""
    return max(16, int(triton.next_power_of_2(width)))


def row_width(hidden: int, staged: bool) -> int:
    """Channels of the kernels' arguments for a hidden width: the caller pads them.

    A whole tile, or in stages, where tiles lie in memory, a multiple of what wide accesses take.
    """
    return -(-hidden // 8) * 8 if staged else padded(hidden)


def weight_parts(hidden: int, attrs: int, staged: bool = False) -> dict[str, int]:
    """Names and sizes of the parts of a row of ``Gradients.weights``; the last is padding.

    ``staged``: without the matrices, whose gradients the BLAS computes there.
    """
    sizes = {} if staged else {"w2": hidden * hidden, "w3": hidden * hidden}
    sizes |= dict.fromkeys(VECTORS, hidden) | {"w_a": hidden * attrs, "b_g": 1}
    # rows begin where wide accesses may
    return sizes | {"padding": -sum(sizes.values()) % 32}


class Order(NamedTuple):
    """Which edges are a row's, where edges are sorted by row; one of the two is None.

    Attributes
    ----------
    rowptr : [N + 1], int64
        Row i has the edges ``rowptr[i]`` to ``rowptr[i + 1]``.
    keys : [edges], int32
        The row of each edge.
    """

    rowptr: Any
    keys: Any


class EdgeList(NamedTuple):
    """A graph's edges by receiver, cut into blocks.

    Attributes
    ----------
    order : Order
        The rows are the receivers.
    receivers : [E], int32, or None
        Receiver of each edge; None for complete components.
    senders : [E], int32, or None
        Sender of each edge; None for complete components.
    perm : [E], int32, or None
        The user's number of each edge; None where it is the same.
    first : [N], int32, or None
        First node of each node's component, where these are complete.
    block_rows : [blocks, 2], int32
        Receivers of each block's first and last edge.
    """

    order: Order
    receivers: Any
    senders: Any
    perm: Any
    first: Any
    block_rows: Any


class Rows(NamedTuple):
    """Where sums over rows of edges go.

    Attributes
    ----------
    out : [N, W], float32
        The rows; those without an edge are not written.
    slots : [2 programs, W], float32
        The sums of each program's first and last row, which other programs may share: finish_rows
        adds them to the rows.
    """

    out: Any
    slots: Any


class Inputs(NamedTuple):
    """``pq [N, 2H]``, ``x [N, D]``, ``edge_attr [E, A]`` or None, ``edge_mask [E]`` or None."""

    pq: Any
    x: Any
    edge_attr: Any
    edge_mask: Any


class Weights(NamedTuple):
    """The edge pass's weights, dense; matrices in the type of the products' operands."""

    w_r: Any
    w_a: Any
    w2: Any
    b2: Any
    w_g: Any
    b_g: Any
    w3: Any
    b3: Any
    w_x: Any


class Numbers(NamedTuple):
    """Options that are numbers: slope of LeakyReLU, the k of ``coord_norm``, ``coord_clamp``."""

    negative_slope: Any
    coord_norm: Any
    coord_clamp: Any


class Problem(NamedTuple):
    """A call of the edge pass as its kernels see it."""

    edges: EdgeList
    inputs: Inputs
    weights: Weights
    numbers: Numbers


class Chunk(NamedTuple):
    """The edges of one launch.

    Attributes
    ----------
    begin, end : the first edge, and one past the last
    blocks : blocks of edges
    programs : programs that share these
    """

    begin: int
    end: int
    blocks: int
    programs: int

    @property
    def arguments(self) -> tuple[int, int, int]:
        """``begin_edge, end_edge, num_blocks`` of the kernels."""
        return self.begin, self.end, self.blocks


@dataclass(frozen=True)
class LayerOptions:
    """The options of a layer that reach the kernels, as the operator has them.

    Attributes
    ----------
    activation : "silu", "relu" or "leaky_relu"
    negative_slope : of LeakyReLU
    coord_norm : 0 for none, below 0 for "unit", else k
    coord_tanh : whether the coordinate head ends with a tanh
    coord_clamp : 0 for none
    """

    activation: str = "silu"
    negative_slope: float = 0.01
    coord_norm: float = 0.0
    coord_tanh: bool = False
    coord_clamp: float = 0.0

    @classmethod
    def of(cls, arguments: Any) -> LayerOptions:
        """Those among an operator's arguments by name."""
        return cls(*(getattr(arguments, each.name) for each in fields(cls)))

    @property
    def numbers(self) -> Numbers:
        """Those that are arguments of the kernels, not constants."""
        return Numbers(*(float(getattr(self, name)) for name in Numbers._fields))

    @property
    def constants(self) -> dict[str, Any]:
        """Those that the kernels are compiled for, by their names in :class:`Spec`."""
        return {
            "ACT": ACTIVATIONS[self.activation],
            "NORM": 0 if self.coord_norm == 0 else 1 if self.coord_norm < 0 else 2,
            "TANH": self.coord_tanh,
            "CLAMP": self.coord_clamp > 0,
        }


# The fields of Spec that each kernel reads, itself or in a function that it calls. It gets only
# these: Triton compiles a kernel again for each value of a constant, also of one that it does not
# read. A new option of the coordinate head goes into _HEAD.
_ACTIVATION = ("ACT", "APPROX", "PAIRED", "PTX")
_PRODUCT = ("OPERAND", "DOT", "ROUND")
_TILE = ("H", "D", "A", "HP", "DP", "AP", "BLOCK")
_HEAD = ("NORM", "TANH", "CLAMP")
READ: dict[str, tuple[str, ...]] = {
    "edge_forward": (*_TILE, *_ACTIVATION, *_PRODUCT, *_HEAD, "PART", "STREAMED"),
    "edge_backward": (
        *_TILE, *_ACTIVATION, *_PRODUCT, *_HEAD, "EXACT", "SHARED_SLOPES", "PART", "K", "STREAMED",
        "IN_MEMORY", "PREFETCH",
    ),
    "staged_first": (*_TILE, *_ACTIVATION, *_PRODUCT),
    "staged_messages": ("H", "D", "HP", "BLOCK", *_ACTIVATION, "OPERAND", "PART"),
    "staged_shifts": ("H", "D", "HP", "DP", "BLOCK", *_ACTIVATION, *_HEAD, "OPERAND", "PART"),
    "staged_shifts_backward": (
        "H", "D", "A", "HP", "DP", "BLOCK", *_ACTIVATION, *_PRODUCT, *_HEAD, "K",
    ),
    "staged_messages_backward": (
        "H", "A", "HP", "BLOCK", *_ACTIVATION, *_PRODUCT, "K",
    ),
    "staged_first_backward": (*_TILE, *_ACTIVATION, *_PRODUCT, "PART", "K"),
    "sender_sums": ("H", "D", "HP", "DP", "BLOCK", "OPERAND", "PART"),
    "project_nodes": ("H", "D", "HP", "DP", *_PRODUCT),
    "update_nodes": ("H", "D", "HP", "DP", *_ACTIVATION, *_PRODUCT),
    "pack_weights": ("HP", "AP", "OPERAND", "ROUND"),
}  # fmt: skip


@cache
def _record_of(names: tuple[str, ...]) -> Any:
    return namedtuple("Constants", names)  # the fields depend on the kernel


def only(record: Any, names: tuple[str, ...]) -> Any:
    """A record of these fields of another; a kernel that reads one more fails."""
    return _record_of(names)(*(getattr(record, name) for name in names))


class Spec(NamedTuple):
    """What kernels are compiled for; :data:`READ` says which of it each of them reads.

    Attributes
    ----------
    H, D, A : hidden width, coordinate dimension, width of the edge attributes
    HP, DP, AP : the same, padded to what a tile can have
    BLOCK : edges of a block
    ACT : 0 SiLU, 1 ReLU, 2 LeakyReLU
    NORM : 0 none, 1 "unit", 2 a number
    TANH, CLAMP : whether the coordinate head has them
    OPERAND : type of the products' operands
    DOT : ``input_precision`` of products of float32 operands
    ROUND : whether these are rounded to tf32 first; the matrix units would truncate them
    EXACT : whether products are as accurate as float32
    SHARED_SLOPES : how many layers, from the first, hold their slopes in shared memory (backward)
    PART : type of the parts of 8 bits in which float32 values are summed
    APPROX : whether SiLU is computed from the special units' tanh, to 11 bits
    PAIRED : whether one reciprocal serves two activations
    PTX : whether NVIDIA's instructions may be used that Triton has no function for
    K : width of a program's sums for the weights (backward)
    STREAMED : how many of w3 and w2 are loaded again for each block, as shared memory is too small
    IN_MEMORY : how many of the sums for w2 and w3 are in memory, not in registers (backward)
    PREFETCH : whether L2 loads the next block's rows ahead (backward)
    """

    H: Any
    D: Any
    A: Any
    HP: Any
    DP: Any
    AP: Any
    BLOCK: Any
    ACT: Any
    NORM: Any
    TANH: Any
    CLAMP: Any
    OPERAND: Any
    DOT: Any
    ROUND: Any
    EXACT: Any
    SHARED_SLOPES: Any
    PART: Any
    APPROX: Any
    PAIRED: Any
    PTX: Any
    K: Any
    STREAMED: Any
    IN_MEMORY: Any
    PREFETCH: Any

    @classmethod
    def of(cls, **fields: Any) -> Spec:
        """A record of constants."""
        return cls(**{name: tl.constexpr(value) for name, value in fields.items()})

    def read_by(self, kernel: str) -> Any:
        """The constants that a kernel reads, as a record: its argument ``spec``."""
        return only(self, READ[kernel])

    @classmethod
    def make(
        cls, options: LayerOptions, *, hidden: int, dim: int, attrs: int, precision: str,
        blocks: Blocks, nvidia: bool,
    ) -> Spec:  # fmt: skip
        """The constants of a call; ``precision`` is the operator's, ``hidden`` a row's width."""
        products = precision.removesuffix(APPROXIMATE)
        # NVIDIA alone has products of parts; elsewhere these are products of float32
        exact = blocks.split if nvidia else "ieee"
        # the interpreter multiplies exactly whatever it is told, and knows fewer names
        exact = "tf32x3" if interpreting() else exact
        # slopes of ReLU come by another way, for which wide tiles leave no room
        crowded = options.activation != "silu" and blocks.edges * padded(hidden) > 64 * 64
        return cls.of(
            **options.constants,
            H=hidden, D=dim, A=attrs,
            HP=padded(hidden), DP=triton.next_power_of_2(dim), AP=padded(attrs),
            BLOCK=blocks.edges,
            OPERAND=OPERANDS.get(products, tl.float32),
            DOT=exact if products == "highest" else "tf32",
            ROUND=products == "high" and nvidia,
            EXACT=products == "highest",
            SHARED_SLOPES=0 if products == "highest" or crowded else blocks.shared_slopes,
            PART=PART,
            APPROX=precision != products, PAIRED=blocks.paired, PTX=nvidia and not interpreting(),
            K=sum(weight_parts(hidden, attrs, blocks.staged).values()), STREAMED=blocks.streamed,
            IN_MEMORY=blocks.in_memory, PREFETCH=blocks.prefetch,
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How the kernels of a call are compiled and launched.

    Attributes
    ----------
    spec : constants
    blocks : block sizes
    options : how Triton is to compile the edge pass
    precision : of the products: "highest", "high", "bf16" or "fp16"
    arch : the architecture, like "sm_90"
    nvidia : whether it is NVIDIA's
    """

    spec: Spec
    blocks: Blocks
    options: Mapping[str, int]
    precision: str
    arch: str
    nvidia: bool
    _read: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def make(
        cls, direction: str, blocks: Blocks, options: LayerOptions, *, hidden: int, dim: int,
        attrs: int, precision: str, arch: str, nvidia: bool,
    ) -> Plan:  # fmt: skip
        """That of a pass, ``"forward"`` or ``"backward"``; other arguments as of Spec.make."""
        spec = Spec.make(
            options, hidden=hidden, dim=dim, attrs=attrs, precision=precision, blocks=blocks,
            nvidia=nvidia,
        )  # fmt: skip
        launch = blocks.launch_options(direction, nvidia)
        return cls(spec, blocks, launch, precision.removesuffix(APPROXIMATE), arch, nvidia)

    def constants(self, kernel: str) -> Any:
        """The constants that a kernel reads; one record for all its launches."""
        if kernel not in self._read:
            self._read[kernel] = self.spec.read_by(kernel)
        return self._read[kernel]
