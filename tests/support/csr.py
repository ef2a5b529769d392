"""What holds for every Graph of an edge list."""

from __future__ import annotations

import torch
from torch import Tensor

from egnn_fast import Graph


def check_csr(graph: Graph, edges: Tensor, nodes: int) -> None:
    """What the kernels rely on, from the edge list in the user's order."""
    assert graph.num_nodes == nodes
    assert graph.num_edges == edges.shape[1]
    assert graph.rowptr.dtype == torch.int64
    below = torch.searchsorted(edges[0].sort().values, torch.arange(nodes + 1))
    assert torch.equal(graph.rowptr, below)
    assert torch.equal(graph.degree, torch.bincount(edges[0], minlength=nodes))
    place = torch.arange(edges.shape[1]) if graph.perm is None else graph.perm.long()
    assert torch.equal(place.sort().values, torch.arange(edges.shape[1]))
    assert torch.equal(graph.receivers, edges[0][place])
    assert torch.equal(graph.sorted_senders(), edges[1][place])
    same_row = graph.receivers.diff() == 0
    assert (graph.receivers.diff() >= 0).all()
    assert (place.diff()[same_row] > 0).all(), "the sort is not stable"
    for index in (graph.senders, graph.perm, graph.first):
        assert index is None or index.dtype == torch.int32
