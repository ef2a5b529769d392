"""Several graphs as one: nodes and edges are numbered one graph after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from egnn_fast.graph.edge_lists import check_totals

if TYPE_CHECKING:
    from egnn_fast.graph import Graph


def joined(
    graphs: Sequence[Graph],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, int]:
    """The constructor arguments of the Graph that holds all ``graphs``.

    Returns ``(rowptr, senders, perm, first, sizes, num_edges)`` with the shapes and dtypes of
    :class:`egnn_fast.Graph`. At least one graph; all on one device.

    Raises
    ------
    ValueError
        There are more than 2**31 - 1 nodes or edges.
    """
    device = graphs[0].device
    nodes, edges = [g.num_nodes for g in graphs], [g.num_edges for g in graphs]
    check_totals("graphs", sum(nodes), sum(edges))
    # node and edge numbers of graph k grow by those of the graphs before it
    node_increments, edge_increments = [0, *nodes[:-1]], [0, *edges[:-1]]
    rowptr = concatenate_shifted([g.rowptr[:-1] for g in graphs], nodes, edge_increments)
    end = torch.tensor([sum(edges)], dtype=torch.int64, device=device)
    first = senders = perm = None
    firsts = [g.first for g in graphs if g.senders is None and g.first is not None]
    if len(firsts) == len(graphs):
        first = concatenate_shifted(firsts, nodes, node_increments)
    else:
        explicit_senders = [
            g.sorted_senders().to(torch.int32) if g.senders is None else g.senders for g in graphs
        ]
        senders = concatenate_shifted(explicit_senders, edges, node_increments)
    if any(g.perm is not None for g in graphs):
        identity = torch.arange(max(edges), dtype=torch.int32, device=device)
        perms = [
            identity[:count] if g.perm is None else g.perm
            for g, count in zip(graphs, edges, strict=True)
        ]
        perm = concatenate_shifted(perms, edges, edge_increments)
    node_counts = torch.tensor(nodes, dtype=torch.int64, device=device)
    sizes = node_counts
    if any(g.sizes is not None for g in graphs):
        # a batch among the graphs counts as its graphs
        sizes = torch.cat(
            [node_counts[k : k + 1] if g.sizes is None else g.sizes for k, g in enumerate(graphs)]
        )
    return torch.cat((rowptr, end)), senders, perm, first, sizes, sum(edges)


def concatenate_shifted(
    parts: Sequence[Tensor], counts: list[int], increments: list[int]
) -> Tensor:
    """Concatenate 1-D integer tensors, adding ``sum(increments[:k + 1])`` to part k.

    Part k has ``counts[k]`` elements. All parts and the result have one dtype.
    """
    values = torch.cat(list(parts))
    steps = torch.tensor(increments, dtype=values.dtype, device=values.device)
    repeats = torch.tensor(counts, dtype=torch.int64, device=values.device)
    # the cumulative sum of int32 is int64
    shifts = torch.repeat_interleave(steps.cumsum(0), repeats, output_size=sum(counts))
    return values + shifts.to(values.dtype)
