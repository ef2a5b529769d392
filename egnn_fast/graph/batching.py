"""Several graphs as one: nodes and edges numbered one graph after the other."""

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
    """The arguments of ``Graph`` for several graphs as one."""
    device = graphs[0].device
    nodes, edges = [g.num_nodes for g in graphs], [g.num_edges for g in graphs]
    check_totals("graphs", sum(nodes), sum(edges))
    before_nodes, before_edges = [0, *nodes[:-1]], [0, *edges[:-1]]
    rowptr = shifted([g.rowptr[:-1] for g in graphs], nodes, before_edges)
    end = torch.tensor([sum(edges)], dtype=torch.int64, device=device)
    first = senders = perm = None
    firsts = [g.first for g in graphs if g.senders is None and g.first is not None]
    if len(firsts) == len(graphs):
        first = shifted(firsts, nodes, before_nodes)
    else:
        listed = [
            g.sorted_senders().to(torch.int32) if g.senders is None else g.senders for g in graphs
        ]
        senders = shifted(listed, edges, before_nodes)
    if any(g.perm is not None for g in graphs):
        identity = torch.arange(max(edges), dtype=torch.int32, device=device)
        orders = [
            identity[:count] if g.perm is None else g.perm
            for g, count in zip(graphs, edges, strict=True)
        ]
        perm = shifted(orders, edges, before_edges)
    whole = torch.tensor(nodes, dtype=torch.int64, device=device)
    sizes = whole
    if any(g.sizes is not None for g in graphs):
        sizes = torch.cat(
            [whole[k : k + 1] if g.sizes is None else g.sizes for k, g in enumerate(graphs)]
        )
    return torch.cat((rowptr, end)), senders, perm, first, sizes, sum(edges)


def shifted(parts: Sequence[Tensor], counts: list[int], by: list[int]) -> Tensor:
    """The parts in one tensor, the k-th, of ``counts[k]`` elements, plus ``sum(by[:k + 1])``."""
    whole = torch.cat(list(parts))
    steps = torch.tensor(by, dtype=whole.dtype, device=whole.device)
    each = torch.tensor(counts, dtype=torch.int64, device=whole.device)
    # cumsum makes int64 of int32
    shift = torch.repeat_interleave(steps.cumsum(0), each, output_size=sum(counts))
    return whole + shift.to(whole.dtype)
