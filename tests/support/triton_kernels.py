"""Kernels of the tests: they show what the device functions of egnn_fast.kernels do."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from egnn_fast import Graph
from egnn_fast.backends.triton.partition import Partition
from egnn_fast.kernels.device import run_of_blocks
from egnn_fast.kernels.edges import block_of_edges, nodes_of
from egnn_fast.kernels.records import EdgeList, Order, Spec


@triton.jit
def _list_edges(  # type: ignore[no-untyped-def]
    edges, begin_edge, end_edge, num_blocks, spec, times, receivers, senders, ends
):
    begin, end = run_of_blocks(num_blocks)
    tl.store(ends + 2 * tl.program_id(0), tl.load(edges.block_rows + 2 * begin))
    for number in range(begin, end):
        block = block_of_edges(edges, begin_edge, end_edge, number, spec)
        i, j = nodes_of(edges, block)
        tl.atomic_add(times + block.edge, tl.full((spec.BLOCK,), 1, tl.int32), mask=block.live)
        tl.store(receivers + block.edge, i, mask=block.live)
        tl.store(senders + block.edge, j, mask=block.live)
        tl.store(ends + 2 * tl.program_id(0) + 1, block.last)


def list_edges(
    graph: Graph, part: Partition, begin: int, end: int, size: int, found: Tensor, ends: Tensor
) -> None:
    """How often each edge was found, its receiver and sender; each program's first and last row."""
    sizes: dict[str, Any] = dict.fromkeys(Spec._fields, 0)
    spec = Spec.of(**(sizes | {"BLOCK": size}))
    # without the receivers they are searched for, as in complete components
    order = Order(graph.rowptr, None)
    edges = EdgeList(order, None, graph.senders, graph.perm, graph.first, part.rows)
    _list_edges[(part.programs,)](edges, begin, end, part.blocks, spec, *found, ends)
