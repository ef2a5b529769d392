"""Kernels of the tests: they show what the device functions of egnn_fast.kernels do."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from egnn_fast import Graph
from egnn_fast.backends.triton.partition import Partition
from egnn_fast.kernels.device import block_of_edges, nodes_of, run_of_blocks
from egnn_fast.kernels.records import EdgeList, Order, Spec


@triton.jit
def _list_edges(  # type: ignore[no-untyped-def]
    edges, begin_edge, end_edge, num_blocks, spec, times, receivers, senders, ends
):
    begin, end = run_of_blocks(num_blocks)
    tl.store(ends + 2 * tl.program_id(0), tl.load(edges.block_rows + 2 * begin))
    for block in range(begin, end):
        _, _, e, live, first, last = block_of_edges(edges, begin_edge, end_edge, block, spec)
        i, j = nodes_of(edges, e, live, first, last)
        tl.atomic_add(times + e, tl.full((spec.BLOCK,), 1, tl.int32), mask=live)
        tl.store(receivers + e, i, mask=live)
        tl.store(senders + e, j, mask=live)
        tl.store(ends + 2 * tl.program_id(0) + 1, last)


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
