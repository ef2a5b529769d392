"""The gradients of a call of the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from egnn_fast.backends.triton.call import Call, ReceiverSums
from egnn_fast.backends.triton.partition import Partition
from egnn_fast.graph import INT32_MAX
from egnn_fast.kernels.backward import launch_edge_backward
from egnn_fast.kernels.gradients import Cotangents, Gradients
from egnn_fast.kernels.records import Weights
from egnn_fast.kernels.sums import SenderEdges, launch_sender_sums


class Backward:
    """The gradients of a call."""

    def __init__(
        self, call: Call, g_m: Tensor | None, g_x: Tensor | None, needed: Sequence[bool]
    ) -> None:
        self.call, self.needed = call, needed
        g_m = None if g_m is None else call.width.widen(g_m, 1)
        self.cotangents = Cotangents(*(g if g is None else g.contiguous() for g in (g_m, g_x)))
        # sums over senders: chunk by chunk in the order of edges, or at once in any order
        self.ordered = torch.are_deterministic_algorithms_enabled() and any(needed[:2])
        held = self.bytes_of_edge()
        self.chunks = [(0, call.num_edges)]
        if held:
            self.chunks = call.chunks(held, self.edges_of_chunk())
        edges, chunk = call.num_edges, self.chunks[0][1]
        self.parts = [call.part(*bounds) for bounds in self.chunks]
        programs = max(part.programs for part in self.parts)

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=call.device)

        hidden, dim = call.hidden, call.dim
        for_pq, for_x, for_attr, for_mask = needed[:4]
        self.pq = call.zeros(2 * hidden) if for_pq else None
        self.x = call.zeros(dim) if for_x else None
        width = sum(call.weight_parts.values())
        self.gradients = Gradients(
            p=None,
            receiver=None,  # of each chunk its own
            sender=call.zeros(dim) if for_x else None,
            edge_attr=new(edges, call.attrs) if for_attr else None,
            edge_mask=new(edges) if for_mask else None,
            messages=new(chunk, hidden) if self.ordered and for_pq else None,
            shifts=new(chunk, dim) if self.ordered and for_x else None,
            weights=new(programs, width).zero_() if any(needed[4:]) else None,
        )

    def bytes_of_edge(self) -> int:
        """Bytes held for each edge of a chunk; 0: none, so that there is one chunk."""
        return 4 * (self.call.hidden + self.call.dim) if self.ordered else 0

    def edges_of_chunk(self) -> int:
        """The most edges of a chunk, apart from the limit on bytes."""
        return INT32_MAX

    def run(self) -> list[Tensor | None]:
        """Launch all kernels; a gradient for each input, None for what is not wanted."""
        call = self.call
        # the head is not run where nothing depends on its output
        none = {} if self.cotangents.x is not None else dict.fromkeys(("w3", "b3", "w_x"))
        weights = call.weights._replace(**none)
        p = None if self.pq is None else self.pq[:, : call.hidden]
        sums = ReceiverSums(call, self.parts, p, self.x)
        for bounds, part in zip(self.chunks, self.parts, strict=True):
            p_rows, x_rows = sums.begin(part)
            self.gradients = self.gradients._replace(p=p_rows, receiver=x_rows)
            self.launch(bounds, part, weights)
            sums.end()
            if self.ordered:
                self._sum_senders(*bounds)
        return self._collect()

    def launch(self, bounds: tuple[int, int], part: Partition, weights: Weights) -> None:
        """The kernel over a chunk's edges."""
        problem, chunk = self.call.problem(part, weights), part.chunk(*bounds)
        with self.call.fitting():
            launch_edge_backward(self.call.plan, problem, self.cotangents, self.gradients, chunk)

    def matrices(self) -> dict[str, Tensor]:
        """Gradients of weights that are not among the programs' sums."""
        return {}

    def _sum_senders(self, begin: int, end: int) -> None:
        """Add up a chunk's gradients for the senders, in the order of edges."""
        call, g = self.call, self.gradients
        order, keys, part = call.part_by_sender(begin, end)
        q = None if self.pq is None else call.rows(self.pq[:, call.hidden :], part.programs)
        x = None if g.sender is None else call.rows(g.sender, part.programs)
        senders = SenderEdges(order, keys, part.rows)
        launch_sender_sums(
            call.plan, senders, g.messages, g.shifts, q, x, part.chunk(begin, end)
        )  # fmt: skip
        call.finish(part.slots, q, x)

    def _collect(self) -> list[Tensor | None]:
        call, g = self.call, self.gradients
        x = None if self.x is None or g.sender is None else self.x - g.sender
        weights: dict[str, Tensor | None] = dict.fromkeys(Weights._fields)
        if g.weights is not None:
            # copies: an operator's outputs share no memory
            total: Any = g.weights.sum(dim=0)
            parts: Any = torch.ops.aten.split_with_sizes_copy.default(
                total, list(call.weight_parts.values())
            )
            weights |= dict(zip(call.weight_parts, parts, strict=True))
            weights |= self.matrices()
        width, pq = call.width, self.pq
        if pq is not None:
            pq = width.narrow(pq.unflatten(1, (2, -1)), 2).flatten(1)
        wanted = dict(zip(Weights._fields, self.needed[4:], strict=True))
        of_weights = (
            width.narrow_weight(name, grad) if wanted[name] and grad is not None else None
            for name, grad in ((name, weights[name]) for name in Weights._fields)
        )
        grads = (pq, x, g.edge_attr, g.edge_mask, *of_weights)
        return [t if n else None for t, n in zip(grads, self.needed, strict=True)]
