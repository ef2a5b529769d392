"""Range and order of an edge list's indices, in the extension where it is built, else in PyTorch.

In a forked child PyTorch's threads hang where the parent has used them; the extension's do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from egnn_fast import _native


def sort_by_receiver(edges: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Sort ``edges [2, E]`` (int64, in range) stably by receiver.

    Returns ``(rowptr [N + 1] int64, senders [E] int32, perm [E] int32, is_sorted)``: ``perm``
    holds the old place of each edge, ``is_sorted`` says that it is the identity.
    """
    if edges.device.type == "cpu" and _native.core is not None:
        return _sort_native(_native.core, edges, num_nodes)
    receivers, perm = torch.sort(edges[0], stable=True)
    rowptr = edges.new_zeros(num_nodes + 1)
    torch.cumsum(torch.bincount(receivers, minlength=num_nodes), 0, out=rowptr[1:])
    is_sorted = bool((edges[0].diff() >= 0).all())
    return rowptr, edges[1][perm].to(torch.int32), perm.to(torch.int32), is_sorted


def index_range(edges: Tensor) -> tuple[int, int]:
    """The smallest and the largest of at least one int64 index."""
    if edges.device.type == "cpu" and _native.core is not None:
        edges = edges.contiguous()
        low, high = _native.core.index_range(edges.data_ptr(), edges.numel())
        return low, high
    low, high = (int(v) for v in torch.aminmax(edges))
    return low, high


def _sort_native(
    core: _native.Core, edges: Tensor, num_nodes: int
) -> tuple[Tensor, Tensor, Tensor, bool]:
    edges = edges.contiguous()
    count = edges.shape[1]
    rowptr = torch.empty(num_nodes + 1, dtype=torch.int64)
    senders = torch.empty(count, dtype=torch.int32)
    perm = torch.empty(count, dtype=torch.int32)
    is_sorted = core.sort_by_receiver(
        edges.data_ptr(), count, num_nodes, rowptr.data_ptr(), senders.data_ptr(), perm.data_ptr()
    )
    return rowptr, senders, perm, is_sorted
