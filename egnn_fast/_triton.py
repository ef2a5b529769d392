"""Calls the Triton kernels: cuts the graph into blocks, allocates the outputs, launches.

``precision`` is that of the matrix products: "highest" (as accurate as float32), "high" (tf32),
"bf16" or "fp16". Coordinates, distances, sums and the weights' gradients are float32 always.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from egnn_fast._partition import Partition, SenderOrder, by_receiver, by_sender, kept
from egnn_fast.graph import INT32_MAX
from egnn_fast.kernels import APPROXIMATE, interpreting
from egnn_fast.kernels.backward import edge_backward
from egnn_fast.kernels.blocks import Blocks, blocks_for, sender_block
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
    weight_parts,
)
from egnn_fast.kernels.sums import finish_rows, sender_sums

N_DIFF = 13  # differentiable inputs of the operator: pq, x, edge_attr, edge_mask, EdgeWeights
# bytes of the gradients that wait for their sum over senders: what stays in the L2 cache
CHUNK_BYTES = 24 << 20
_OPERANDS = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_BLOCK = 1024  # no edge of a last block may lie beyond int32
_INTERPRETED_PROGRAMS = 3


def architecture(device: torch.device) -> str:
    """The GPU's, as NVIDIA names it; the interpreter takes Hopper's block sizes."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


class _Call:
    """A call of the edge pass, forward or backward, for one set of inputs."""

    def __init__(self, direction: str, args: Sequence[Any]) -> None:
        dense: list[Any] = [t if t is None else t.contiguous() for t in args[:N_DIFF]]
        pq, x, edge_attr, edge_mask, *weights = dense
        self.rowptr, self.senders, self.perm, self.first = args[N_DIFF : N_DIFF + 4]
        activation, slope, norm, tanh, clamp, _, self.precision = args[N_DIFF + 4 :]
        self.device, self.nodes = x.device, x.shape[0]
        self.hidden, self.dim = pq.shape[1] // 2, x.shape[1]
        self.attrs = 0 if edge_attr is None else edge_attr.shape[1]
        self.has_head = weights[-1] is not None
        self.num_edges = self._count_edges()
        if self.num_edges > INT32_MAX - MAX_BLOCK:
            raise ValueError(
                f"graph: the Triton kernels take at most {INT32_MAX - MAX_BLOCK} edges, "
                f"got {self.num_edges}"
            )
        products = self.precision.removesuffix(APPROXIMATE)
        self.blocks: Blocks = blocks_for(
            direction, products, padded(self.hidden), architecture(self.device)
        )
        self.spec = Spec.make(
            hidden=self.hidden, dim=self.dim, attrs=self.attrs, precision=self.precision,
            activation=activation, norm=norm, tanh=tanh, clamp=clamp, blocks=self.blocks,
            nvidia=torch.version.hip is None,
        )  # fmt: skip
        self.weight_parts = weight_parts(self.hidden, self.attrs)
        operand = _OPERANDS.get(products, torch.float32)
        self.numbers = Numbers(float(slope), float(norm), float(clamp))
        self.inputs = Inputs(pq, x, edge_attr, edge_mask)
        found = Weights(*weights)
        # matrices in the operands' type; what is added in float32 stays in float32
        self.weights = found._replace(
            w2=found.w2.to(operand), w3=None if found.w3 is None else found.w3.to(operand)
        )

    def _count_edges(self) -> int:
        if self.senders is not None:
            return int(self.senders.shape[0])
        return int(kept(self.rowptr, "num_edges", lambda: int(self.rowptr[-1])))

    @property
    def programs(self) -> int:
        """How many programs fill the device."""
        if interpreting():
            return _INTERPRETED_PROGRAMS
        count = torch.cuda.get_device_properties(self.device).multi_processor_count
        return int(count) * self.blocks.programs

    def part(self, begin: int, end: int) -> Partition:
        """The edges from ``begin`` to ``end``, cut into blocks."""
        key = (begin, end, self.blocks.edges, self.programs)
        return kept(self.rowptr, key, lambda: by_receiver(self.rowptr, *key))

    def part_by_sender(self, begin: int, end: int) -> SenderOrder:
        """The same edges in the order of their senders."""
        key = (begin, end, sender_block(padded(self.hidden)), self.programs)
        graph = (self.rowptr, self.senders, self.first)
        return kept(self.rowptr, ("senders", *key), lambda: by_sender(*graph, *key))

    def edges(self, part: Partition) -> EdgeList:
        """The record of such a run of edges."""
        return EdgeList(Order(self.rowptr, None), self.senders, self.perm, self.first, part.rows)

    def rows(self, out: Tensor, programs: int) -> Rows:
        """Rows with slots of their own."""
        return Rows(out, out.new_empty((2 * programs, out.shape[1])))

    def zeros(self, width: int) -> Tensor:
        """A node tensor to sum into."""
        return torch.zeros((self.nodes, width), dtype=torch.float32, device=self.device)

    def finish(self, part: Partition, a: Rows | None, b: Rows | None) -> None:
        """Bring the rows that programs share to their places."""
        sizes = [(0, 0) if r is None else (r.out.stride(0), r.out.shape[1]) for r in (a, b)]
        slots = part.slots.shape[0]
        finish_rows[(slots,)](
            part.slots, slots, a, *sizes[0], b, *sizes[1],
            A=triton.next_power_of_2(sizes[0][1]), B=triton.next_power_of_2(sizes[1][1]),
            num_warps=1 if self.hidden <= 64 else 4,
        )  # fmt: skip


def messages(*args: Any) -> tuple[Tensor, Tensor]:
    """``egnn_fast::messages`` by Triton."""
    with _current(args[1].device):
        return _messages(*args)


def _messages(*args: Any) -> tuple[Tensor, Tensor]:
    call = _Call("forward", args)
    m, shift = call.zeros(call.hidden), call.zeros(call.dim) if call.has_head else None
    if call.num_edges:
        part = call.part(0, call.num_edges)
        m_rows = call.rows(m, part.programs)
        x_rows = None if shift is None else call.rows(shift, part.programs)
        edge_forward[(part.programs,)](
            call.edges(part), call.inputs, call.weights, call.numbers,
            m_rows, x_rows, 0, call.num_edges, part.blocks, call.spec, num_warps=call.blocks.warps,
        )  # fmt: skip
        call.finish(part, m_rows, x_rows)
        launches["forward"] += 1
    return m, m.new_empty((0, call.dim)) if shift is None else shift


def messages_backward(g_m: Tensor | None, g_x: Tensor | None, *args: Any) -> list[Tensor]:
    """``egnn_fast::messages_backward`` by Triton."""
    with _current(args[1].device):
        return _messages_backward(g_m, g_x, *args)


def _messages_backward(g_m: Tensor | None, g_x: Tensor | None, *args: Any) -> list[Tensor]:
    *args, needed = args  # type: ignore[assignment]
    call = _Call("backward", args)
    if not call.has_head:
        g_x = None
    if call.num_edges == 0 or (g_m is None and g_x is None):
        return [torch.zeros_like(t) for t, n in zip(args, needed, strict=False) if n]
    found = _Backward(call, g_m, g_x, needed).run()
    launches["backward"] += 1
    return [
        grad.to(t.dtype).reshape(t.shape)
        for t, grad, n in zip(args, found, needed, strict=False)
        if n and grad is not None
    ]


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Backward:
    """The gradients of a call."""

    def __init__(
        self, call: _Call, g_m: Tensor | None, g_x: Tensor | None, needed: Sequence[bool]
    ) -> None:
        self.call, self.needed = call, needed
        self.cotangents = Cotangents(*(g if g is None else g.contiguous() for g in (g_m, g_x)))
        # sums over senders: chunk by chunk in the order of edges, or at once in any order
        self.ordered = torch.are_deterministic_algorithms_enabled() and any(needed[:2])
        edges, chunk = call.num_edges, call.num_edges
        if self.ordered:
            size = call.blocks.edges
            most = CHUNK_BYTES // (4 * (call.hidden + call.dim)) // size * size
            chunk = min(edges, max(size, most))
        self.chunks = [(begin, min(begin + chunk, edges)) for begin in range(0, edges, chunk)]
        self.parts = [call.part(*bounds) for bounds in self.chunks]
        programs = max(part.programs for part in self.parts)

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=call.device)

        hidden, dim = call.hidden, call.dim
        for_pq, for_x, for_attr, for_mask = needed[:4]
        self.pq = call.zeros(2 * hidden) if for_pq else None
        width = sum(call.weight_parts.values())
        self.gradients = Gradients(
            p=None if self.pq is None else call.rows(self.pq[:, :hidden], programs),
            receiver=call.rows(call.zeros(dim), programs) if for_x else None,
            sender=call.zeros(dim) if for_x else None,
            edge_attr=new(edges, call.attrs) if for_attr else None,
            edge_mask=new(edges) if for_mask else None,
            messages=new(chunk, hidden) if self.ordered and for_pq else None,
            shifts=new(chunk, dim) if self.ordered and for_x else None,
            weights=new(programs, width).zero_() if any(needed[4:]) else None,
        )

    def run(self) -> list[Tensor | None]:
        """Launch all kernels; a gradient for each input, None for what is not wanted."""
        call, g = self.call, self.gradients
        # the head is not run where nothing depends on its output
        none = {} if self.cotangents.x is not None else dict.fromkeys(("w3", "b3", "w_x"))
        weights = call.weights._replace(**none)
        for bounds, part in zip(self.chunks, self.parts, strict=True):
            edge_backward[(part.programs,)](
                call.edges(part), call.inputs, weights, call.numbers, self.cotangents, g,
                *bounds, part.blocks, call.spec, num_warps=call.blocks.warps,
            )  # fmt: skip
            if g.p is not None or g.receiver is not None:
                call.finish(part, g.p, g.receiver)
            if self.ordered:
                self._sum_senders(*bounds)
        return self._collect()

    def _sum_senders(self, begin: int, end: int) -> None:
        """Add up a chunk's gradients for the senders, in the order of edges."""
        call, g = self.call, self.gradients
        order, keys, part = call.part_by_sender(begin, end)
        q = None if self.pq is None else call.rows(self.pq[:, call.hidden :], part.programs)
        x = None if g.sender is None else call.rows(g.sender, part.programs)
        sender_sums[(part.programs,)](
            order, Order(None, keys), part.rows, end - begin, part.blocks,
            g.messages, q, 2 * call.hidden, g.shifts, x,
            H=call.hidden, D=call.dim, HP=call.spec.HP, DP=call.spec.DP,
            BLOCK=sender_block(call.spec.HP.value), PART=call.spec.PART.value,
        )  # fmt: skip
        call.finish(part, q, x)

    def _collect(self) -> list[Tensor | None]:
        call, g = self.call, self.gradients
        x = None if g.receiver is None or g.sender is None else g.receiver.out - g.sender
        found: dict[str, Tensor | None] = dict.fromkeys(Weights._fields)
        if g.weights is not None:
            # copies: an operator's outputs share no memory
            total: Any = g.weights.sum(dim=0)
            parts: Any = torch.ops.aten.split_with_sizes_copy.default(
                total, list(call.weight_parts.values())
            )
            found |= dict(zip(call.weight_parts, parts, strict=True))
        grads = (self.pq, x, g.edge_attr, g.edge_mask, *(found[n] for n in Weights._fields))
        return [t if n else None for t, n in zip(grads, self.needed, strict=True)]


# how often the kernels were launched
launches = {"forward": 0, "backward": 0}
