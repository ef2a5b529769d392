"""Layers too wide for one kernel: stages over chunks of edges, products by the BLAS between.

Memory for a chunk's edges are a few tiles ``[chunk, H]`` in the type of the products' operands; see
:mod:`egnn_fast.kernels.staged`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from egnn_fast.backends.triton import backward
from egnn_fast.backends.triton.call import Call, ReceiverSums
from egnn_fast.backends.triton.partition import Partition
from egnn_fast.backends.triton.products import multiply
from egnn_fast.kernels import gradients
from egnn_fast.kernels.records import Weights
from egnn_fast.kernels.staged import (
    launch_staged_first,
    launch_staged_messages,
    launch_staged_shifts,
)
from egnn_fast.kernels.staged_backward import (
    launch_staged_first_backward,
    launch_staged_messages_backward,
    launch_staged_shifts_backward,
)
from egnn_fast.operators.precision import float32_products

_TILES_FORWARD, _TILES_BACKWARD = 2, 4
# edges over which the matrix units sum a weight's gradient; such sums are added up outside of them,
# where they are rounded to nearest
OUTER_EDGES: int = gradients.FLUSH.value


class _Stages:
    """The stages of a call over a chunk at a time, and the products between them."""

    def __init__(self, call: Call, tiles: int, chunk: int) -> None:
        self.call = call
        # rows that are multiples of 16: tiles begin where wide accesses may
        shape = (tiles, -(-chunk // 16) * 16, call.hidden)
        self._tiles = torch.empty(shape, dtype=call.operand, device=call.device)

    def begin(self, bounds: tuple[int, int], part: Partition, weights: Weights) -> list[Tensor]:
        """Begin a chunk; returns its tiles."""
        self._bounds = bounds
        self._problem, self._chunk = self.call.problem(part, weights), part.chunk(*bounds)
        return list(self._tiles[:, : bounds[1] - bounds[0]])

    def launch(self, launcher: Callable[..., None], *args: Any) -> None:
        """Launch a stage; ``args`` are the launcher's arguments between its problem and chunk."""
        launcher(self.call.plan, self._problem, *args, self._chunk)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """``out = a @ b``, in the call's precision."""
        with float32_products(self.call.precision):
            torch.mm(a, b, out=out)

    def add_attrs(self, tile: Tensor) -> Tensor:
        """The product of the edge attributes where the kernels do not make it."""
        assert self.call.w_a is not None
        rows = self.call.attr_rows(*self._bounds)
        self.multiply(rows, self.call.w_a.to(self.call.operand).t(), tile)
        return tile


def _bytes_of_row(call: Call) -> int:
    return call.hidden * call.operand.itemsize


def forward(call: Call, m: Tensor, shift: Tensor | None) -> None:
    """The sums M, and X if there is a head."""
    tiles = _TILES_FORWARD + call.many
    chunks = call.chunks(tiles * _bytes_of_row(call))
    stages = _Stages(call, tiles, chunks[0][1])
    parts = [call.part(*bounds) for bounds in chunks]
    sums, weights = ReceiverSums(call, parts, m, shift), call.weights
    for bounds, part in zip(chunks, parts, strict=True):
        a, b, *more = stages.begin(bounds, part, weights)
        m_rows, x_rows = sums.begin(part)
        stages.launch(launch_staged_first, a, stages.add_attrs(more[0]) if more else None)
        stages.multiply(a, weights.w2.t(), b)
        stages.launch(launch_staged_messages, b, None if x_rows is None else b, m_rows)
        if x_rows is not None:
            stages.multiply(b, weights.w3.t(), a)
            stages.launch(launch_staged_shifts, a, x_rows)
        sums.end()


class Backward(backward.Backward):
    """The gradients of a call."""

    def bytes_of_edge(self) -> int:
        """Tiles, the head's part in gradients of d and mask, what waits for sums over senders."""
        tiles, head = _TILES_BACKWARD + self.call.many, 4 * (self.call.dim + 1)
        return tiles * _bytes_of_row(self.call) + head + super().bytes_of_edge()

    def edges_of_chunk(self) -> int:
        """At most FLUSH for each program: longer sums on the matrix units would be biased.

        Products as accurate as float32 are summed by other units.
        """
        if self.call.plan.spec.EXACT.value:
            return super().edges_of_chunk()
        return self.call.programs * int(gradients.FLUSH.value)

    def run(self) -> list[Tensor | None]:
        """Launch all kernels; a gradient for each input, None for what is not wanted."""
        call, chunk = self.call, self.chunks[0][1]
        self._stages = _Stages(call, _TILES_BACKWARD + call.many, chunk)

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=call.device)

        has_head = self.cotangents.x is not None
        for_weights = self.gradients.weights is not None
        self._g_d = new(chunk, call.dim) if has_head and self.x is not None else None
        for_mask = self.gradients.edge_mask is not None
        self._g_mask = new(chunk) if has_head and for_mask else None
        runs, hidden = _runs(chunk), call.hidden
        size = (runs, hidden, hidden)
        self._w2, self._w3 = (new(*size).zero_() if for_weights else None for _ in range(2))
        many = for_weights and call.many
        self._w_a = new(runs, hidden, call.attrs).zero_() if many else None
        return super().run()

    def launch(self, bounds: tuple[int, int], part: Partition, weights: Weights) -> None:
        """The stages over a chunk's edges: forward, then back."""
        stages, cotangents, gradients = self._stages, self.cotangents, self.gradients
        a1, z2, m, z3, *more = stages.begin(bounds, part, weights)
        added = stages.add_attrs(more[0]) if more else None
        stages.launch(launch_staged_first, a1, added)
        stages.multiply(a1, weights.w2.t(), z2)
        g_m = None
        if weights.w3 is not None:
            stages.launch(launch_staged_messages, z2, m, None)
            stages.multiply(m, weights.w3.t(), z3)
            stages.launch(
                launch_staged_shifts_backward, cotangents, gradients, z3, self._g_d, self._g_mask
            )
            if self._w3 is not None:
                self._add_outer(self._w3, z3, m)
            g_m = m
            stages.multiply(z3, weights.w3, g_m)
        stages.launch(launch_staged_messages_backward, cotangents, gradients, z2, g_m, self._g_mask)
        if self._w2 is not None:
            self._add_outer(self._w2, z2, a1)
        stages.multiply(z2, weights.w2, a1)
        stages.launch(launch_staged_first_backward, gradients, a1, added, self._g_d)
        if added is not None:
            self._attr_gradients(bounds, a1)

    def matrices(self) -> dict[str, Tensor]:
        """The gradients of w2 and w3."""
        assert self._w2 is not None
        assert self._w3 is not None
        sums = {"w2": self._w2.sum(0), "w3": self._w3.sum(0)}
        return sums if self._w_a is None else sums | {"w_a": self._w_a.sum(0)}

    def _attr_gradients(self, bounds: tuple[int, int], g_z1: Tensor) -> None:
        """The gradients of many edge attributes and of their matrix."""
        call, wanted = self.call, self.gradients.edge_attr
        if self._w_a is not None:
            self._add_outer(self._w_a, g_z1, call.attr_rows(*bounds))
        if wanted is None:
            return
        assert call.w_a is not None
        with float32_products(call.precision):
            rows = torch.mm(g_z1, call.w_a.to(call.operand)).to(wanted.dtype)
        if call.perm is None:
            wanted[slice(*bounds)] = rows
        else:
            wanted.index_copy_(0, call.perm[slice(*bounds)].long(), rows)

    def _add_outer(self, totals: Tensor, left: Tensor, right: Tensor) -> None:
        """Add ``leftᵀ right``, sums over edges, in float32: a run of edges to each total."""
        edges = left.shape[0]
        runs = _runs(edges)
        whole = edges - edges % runs
        self._add_products(totals[:runs], left[:whole], right[:whole])
        if whole < edges:
            self._add_products(totals[:1], left[whole:], right[whole:])

    def _add_products(self, totals: Tensor, left: Tensor, right: Tensor) -> None:
        runs = totals.shape[0]
        left, right = (t.view(runs, -1, t.shape[1]) for t in (left, right))
        left = left.transpose(1, 2)
        with float32_products(self.call.precision):
            if left.dtype == torch.float32:
                totals.baddbmm_(left, right)
            else:
                totals += multiply(left, right, self.call.precision)


def _runs(edges: int) -> int:
    """The number of runs, a power of 2, each of at most OUTER_EDGES edges."""
    return int(triton.next_power_of_2(max(1, -(-edges // OUTER_EDGES))))
