"""A call of the Triton kernels: its records, the graph cut into blocks, where outputs go."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from egnn_fast.backends.triton.packing import packed
from egnn_fast.backends.triton.partition import (
    Partition,
    SenderOrder,
    by_receiver,
    cached_by_sender,
    receivers_of,
)
from egnn_fast.backends.triton.products import operand_type
from egnn_fast.backends.triton.width import Width
from egnn_fast.graph import INT32_MAX
from egnn_fast.graph.cache import cached_for
from egnn_fast.kernels import APPROXIMATE, interpreting
from egnn_fast.kernels.blocks import Blocks, blocks_for, sender_block, staged_blocks
from egnn_fast.kernels.records import (
    MAX_ATTRS,
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
    weight_parts,
)
from egnn_fast.kernels.sums import launch_finish_rows
from egnn_fast.operators.signature import GRAPH, MESSAGES

# bytes held for the edges of a chunk. More than L2 has: a wide layer's tiles go to HBM, 4 KB an
# edge forward and 11 backward at H = 256 in 16 bits. Chunks that stay in L2 save that, but then the
# host launches for longer than the GPU works (bench/results/NOTES.md)
CHUNK_BYTES = 128 << 20
# chunks after which one launch adds the slots of programs to their rows
FINISHED_TOGETHER = 16
# kinds of calls whose one kernel asked for more shared memory than a program may have: these run in
# stages. No table can tell, as what a kernel takes depends on its options and on the compiler
_too_large: set[Hashable] = set()
MAX_BLOCK = 1024  # no edge of a last block may lie beyond int32
_INTERPRETED_PROGRAMS = 3


def architecture(device: torch.device) -> str:
    """The GPU's, as NVIDIA names it; the interpreter takes Hopper's block sizes."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


class TooLarge(Exception):
    """The one kernel of a pass does not fit: the same call now runs in stages."""


def _contiguous(tensor: Any) -> Any:
    return None if tensor is None else tensor.contiguous()


class Call:
    """A call of the edge pass, forward or backward, for one set of inputs.

    ``args`` are those of the operator; for a P and Q of None, a layer is to fill
    ``inputs.pq [N, 2 hidden]``, of the channels that the kernels take. ``wanted`` tells apart calls
    of a backward that compute other gradients from other cotangents.
    """

    def __init__(self, direction: str, args: Sequence[Any], wanted: Hashable = ()) -> None:
        self.direction = direction
        call = MESSAGES.Arguments(*args)
        pq, x, edge_attr, edge_mask = map(_contiguous, args[: MESSAGES.index("w_r")])
        weights = Weights(*(getattr(call, name) for name in Weights._fields))
        self.rowptr, self.senders, self.perm, self.first = (
            _contiguous(getattr(call, name)) for name in GRAPH
        )
        self.precision, options = call.precision, LayerOptions.of(call)
        self.device, self.nodes = x.device, x.shape[0]
        channels, self.dim = weights.w2.shape[0], x.shape[1]
        self.attrs = 0 if edge_attr is None else edge_attr.shape[1]
        self.has_head = weights.w_x is not None
        self.num_edges = self._count_edges()
        if self.num_edges > INT32_MAX - MAX_BLOCK:
            raise ValueError(
                f"graph: the Triton kernels take at most {INT32_MAX - MAX_BLOCK} edges, "
                f"got {self.num_edges}"
            )
        products = self.precision.removesuffix(APPROXIMATE)
        self.blocks: Blocks = blocks_for(
            direction, products, padded(channels), architecture(self.device)
        )
        # many edge attributes have products of their own, in chunks of edges
        self.many = self.attrs > MAX_ATTRS
        self._described = call, options, wanted
        large = bool(_too_large) and self._kind() in _too_large
        if (self.many or large) and not self.blocks.staged:
            self.blocks = staged_blocks(products, padded(channels))
        self.staged = self.blocks.staged
        self.hidden = row_width(channels, self.staged)
        self.width = Width(channels, self.hidden)
        attrs = 0 if self.many else self.attrs
        self.plan = Plan.make(
            direction, self.blocks, options, hidden=self.hidden, dim=self.dim, attrs=attrs,
            precision=self.precision, arch=architecture(self.device),
            nvidia=torch.version.hip is None,
        )  # fmt: skip
        self.weight_parts = weight_parts(self.hidden, attrs, self.staged)
        self.operand = operand_type(self.precision)
        self.numbers = options.numbers
        if pq is None:
            pq = x.new_empty((self.nodes, 2 * self.hidden), dtype=self.operand)
        else:
            pq = self.width.widen(pq.unflatten(1, (2, -1)), 2).flatten(1)
        self.inputs = Inputs(pq, x, None if self.many else edge_attr, edge_mask)
        self.edge_attr, self.w_a = edge_attr, None
        if self.many:
            self.w_a = self.width.widen(weights.w_a, 0)
            weights = weights._replace(w_a=None)
        self.weights = packed(weights, self.plan)

    def _kind(self) -> Hashable:
        """What decides, beside the compiler, whether the one kernel of a pass fits."""
        call, options, wanted = self._described
        inputs = (getattr(call, name) is None for name in (*MESSAGES.names, *GRAPH))
        return (
            self.blocks, self.direction, wanted, self.precision, padded(call.w2.shape[0]), self.dim,
            self.attrs, *options.constants.values(), architecture(self.device),
            torch.are_deterministic_algorithms_enabled(), *inputs,
        )  # fmt: skip

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Raise TooLarge where a pass's one kernel does not fit; it has not run then."""
        try:
            yield
        except OutOfResources as error:
            _too_large.add(self._kind())
            raise TooLarge from error

    def attr_rows(self, begin: int, end: int) -> Tensor:
        """The edge attributes ``[end - begin, A]`` of edges, as products take them."""
        assert self.edge_attr is not None
        if self.perm is None:
            return self.edge_attr[begin:end].to(self.operand)
        return self.edge_attr.index_select(0, self.perm[begin:end]).to(self.operand)

    def _count_edges(self) -> int:
        if self.senders is not None:
            return int(self.senders.shape[0])
        return int(cached_for(self.rowptr, "num_edges", self._last_of_rowptr))

    def _last_of_rowptr(self) -> int:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "graph: the number of edges of complete components is read at their first call, "
                "which must come before the capture of a CUDA graph"
            )
        return int(self.rowptr[-1])

    @property
    def programs(self) -> int:
        """How many programs fill the device."""
        if interpreting():
            return _INTERPRETED_PROGRAMS
        return self.multiprocessors * self.blocks.programs

    @property
    def multiprocessors(self) -> int:
        """The multiprocessors of the device."""
        if interpreting():
            return 1
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)

    def chunks(self, bytes_of_edge: int, most_edges: int = INT32_MAX) -> list[tuple[int, int]]:
        """The edges cut into chunks ``(begin, end)`` of whole blocks.

        As few chunks as CHUNK_BYTES, of which each edge takes ``bytes_of_edge``, and ``most_edges``
        allow; of one size, as far as blocks allow it.
        """
        size, edges = self.blocks.edges, self.num_edges
        blocks = -(-edges // size)
        most = max(1, min(CHUNK_BYTES // bytes_of_edge, most_edges) // size)
        chunk = -(-blocks // -(-blocks // most)) * size
        return [(begin, min(begin + chunk, edges)) for begin in range(0, edges, chunk)]

    def part(self, begin: int, end: int) -> Partition:
        """The edges from ``begin`` to ``end``, cut into blocks."""
        key = (begin, end, self.blocks.edges, self.programs)
        return cached_for(self.rowptr, key, lambda: by_receiver(self.rowptr, *key))

    def part_by_sender(self, begin: int, end: int) -> SenderOrder:
        """The same edges in the order of their senders."""
        key = (begin, end, sender_block(padded(self.hidden)), self.programs)
        return cached_by_sender(self.rowptr, self.senders, self.first, *key)

    def problem(self, part: Partition, weights: Weights | None = None) -> Problem:
        """The call over such a run of edges; ``weights`` may be fewer than the call's."""
        receivers, order = self.receivers, Order(self.rowptr, None)
        # backward a list of receivers would take too many registers: it searches rowptr
        if receivers is not None and self.direction == "forward":
            order = Order(None, receivers)
        edges = EdgeList(order, receivers, self.senders, self.perm, self.first, part.rows)
        return Problem(edges, self.inputs, weights or self.weights, self.numbers)

    @cached_property
    def receivers(self) -> Tensor | None:
        """The receiver of each edge, ``[E]``; None where kernels search for it in rowptr.

        They do in complete components, and in stages, which wait for memory anyway.
        """
        if self.senders is None or self.staged:
            return None
        key, count = ("receivers", self.num_edges), self.num_edges
        cached: Tensor = cached_for(self.rowptr, key, lambda: receivers_of(self.rowptr, count))
        return cached

    def rows(self, out: Tensor, programs: int) -> Rows:
        """Rows with slots of their own."""
        return Rows(out, out.new_empty((2 * programs, out.shape[1])))

    def zeros(self, width: int) -> Tensor:
        """A node tensor to sum into."""
        return torch.zeros((self.nodes, width), dtype=torch.float32, device=self.device)

    def finish(self, slot_rows: Tensor, a: Rows | None, b: Rows | None) -> None:
        """Add the slots of programs to their rows; ``slot_rows`` as in a Partition."""
        launch_finish_rows(self.plan, slot_rows, a, b)


class ReceiverSums:
    """Where sums over the rows of one or two matrices go, chunk by chunk of edges in their order.

    Each program's first and last row wait in slots; those of up to FINISHED_TOGETHER chunks are
    finished in one launch.
    """

    def __init__(
        self, call: Call, parts: Sequence[Partition], a: Tensor | None, b: Tensor | None
    ) -> None:
        self.call = call
        # of one size but for the last, which may be smaller
        programs = sum(part.programs for part in parts[:FINISHED_TOGETHER])
        self._rows = [None if out is None else call.rows(out, programs) for out in (a, b)]
        self._waiting: list[Tensor] = []
        self._left = len(parts)

    def begin(self, part: Partition) -> tuple[Rows | None, Rows | None]:
        """Where the next chunk's sums go."""
        begin = sum(slots.shape[0] for slots in self._waiting)
        own = slice(begin, begin + part.slots.shape[0])
        self._waiting.append(part.slots)
        a, b = (None if r is None else r._replace(slots=r.slots[own]) for r in self._rows)
        return a, b

    def end(self) -> None:
        """Finish what waits, after FINISHED_TOGETHER chunks or the last one."""
        self._left -= 1
        if len(self._waiting) < FINISHED_TOGETHER and self._left:
            return
        if any(rows is not None for rows in self._rows):
            several = len(self._waiting) > 1
            slot_rows = torch.cat(self._waiting) if several else self._waiting[0]
            self.call.finish(slot_rows, *self._rows)
        self._waiting = []
