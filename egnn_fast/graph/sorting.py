"""Sorts an edge list by receiver; checks the range of its indices; computes checksums.

On the CPU the C++ extension does the work if it is built, elsewhere PyTorch. In a forked child
PyTorch's threads hang if the parent has used them; the extension's do not. Traces record the sort
as the operator ``egnn_fast::sort_by_receiver``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from egnn_fast.graph.edge_lists import as_count, check_edge_count
from egnn_fast.runtime import native
from egnn_fast.runtime.eager import is_plain

# a fragment: operators/autograd.py defines the namespace
lib = torch.library.Library("egnn_fast", "FRAGMENT")


def sort_by_receiver(edges: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Sort ``edges [2, E]`` (int64, indices in range) stably by receiver.

    Returns ``(rowptr [N + 1] int64, senders [E] int32, perm [E] int32, is_sorted)``. Edge k of the
    sorted list is edge ``perm[k]`` of ``edges``; ``is_sorted`` says that ``perm`` is the identity.

    Raises
    ------
    TypeError
        The extension would sort, but ``edges`` is not plain.
    """
    if edges.device.type == "cpu" and native.core is not None:
        return _sort_native(native.core, edges, num_nodes)
    receivers, perm = torch.sort(edges[0], stable=True)
    rowptr = prefix_sum(torch.bincount(receivers, minlength=num_nodes))
    is_sorted = bool((edges[0].diff() >= 0).all())
    return rowptr, edges[1][perm].to(torch.int32), perm.to(torch.int32), is_sorted


def prefix_sum(counts: Tensor) -> Tensor:
    """``out[k] = sum(counts[:k])``: integers ``[K]`` to int64 ``[K + 1]``."""
    out = counts.new_zeros(counts.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=out[1:])
    return out


def check_index_range(edges: Tensor, num_nodes: int) -> None:
    """Raise IndexError unless every entry of ``edges [2, E]`` lies in [0, num_nodes)."""
    if edges.shape[1] == 0:
        return
    low, high = index_range(edges)
    if low < 0:
        raise IndexError(f"edge_index: indices must not be negative, got {low}")
    if high >= num_nodes:
        raise IndexError(f"edge_index: indices must be below num_nodes = {num_nodes}, got {high}")


def index_range(edges: Tensor) -> tuple[int, int]:
    """The smallest and the largest index of ``edges [2, E]``, int64, with E >= 1."""
    if edges.device.type == "cpu" and native.core is not None:
        edges = _contiguous_plain(edges)
        low, high = native.core.index_range(edges.data_ptr(), edges.numel())
        return low, high
    low, high = (int(v) for v in torch.aminmax(edges))
    return low, high


def checksum(core: native.Core, tensor: Tensor) -> int:
    """A 64-bit checksum of the content of a plain CPU tensor of any shape and dtype."""
    dense = tensor
    if not tensor.is_contiguous():
        # the transpose of a list of pairs [E, 2] is contiguous: no copy is made of it
        dense = (tensor.t() if tensor.dim() == 2 else tensor).contiguous()
    value: int = core.checksum(dense.data_ptr(), dense.nbytes, torch.get_num_threads())
    return value


def _sort_native(
    core: native.Core, edges: Tensor, num_nodes: int
) -> tuple[Tensor, Tensor, Tensor, bool]:
    edges = _contiguous_plain(edges)
    count = edges.shape[1]
    rowptr = torch.empty(num_nodes + 1, dtype=torch.int64, device="cpu")
    senders = torch.empty(count, dtype=torch.int32, device="cpu")
    perm = torch.empty(count, dtype=torch.int32, device="cpu")
    is_sorted = core.sort_by_receiver(
        edges.data_ptr(), count, num_nodes, rowptr.data_ptr(), senders.data_ptr(), perm.data_ptr()
    )
    return rowptr, senders, perm, is_sorted


def _contiguous_plain(edges: Tensor) -> Tensor:
    """``edges``, contiguous, so that the extension can read them by address."""
    if not is_plain(edges):
        raise TypeError(
            f"edge_index: this {type(edges).__name__} has no memory of its own that could be read; "
            "pass a plain tensor"
        )
    return edges.contiguous()


def sort_in_trace(edges: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(rowptr, senders, perm)`` as :func:`sort_by_receiver`, recorded by a trace as an operator.

    The operator checks ``edges [2, E]`` when it runs.
    """
    results: tuple[Tensor, Tensor, Tensor] = torch.ops.egnn_fast.sort_by_receiver.default(
        edges, num_nodes
    )
    return results


def _sort(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    check_edge_count(edge_index)
    as_count("num_nodes", num_nodes)
    check_index_range(edge_index, num_nodes)
    return sort_by_receiver(edge_index, num_nodes)[:3]


def _sort_fake(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    edges = edge_index.shape[1]
    int32 = edge_index.new_empty((edges,), dtype=torch.int32)
    return edge_index.new_empty((num_nodes + 1,)), int32, torch.empty_like(int32)


def _sort_vmap(info: Any, in_dims: tuple[Any, ...], edges: Tensor, num_nodes: int) -> Any:
    lists = edges.movedim(in_dims[0], 0).unbind()
    if not lists:
        raise ValueError("egnn_fast: vmap needs a batch of at least 1, got 0")
    results = [sort_in_trace(each, num_nodes) for each in lists]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0, 0)


lib.define("sort_by_receiver(Tensor edge_index, SymInt num_nodes) -> (Tensor, Tensor, Tensor)")
lib.impl("sort_by_receiver", _sort, "CompositeExplicitAutograd")
torch.library.register_fake("egnn_fast::sort_by_receiver", _sort_fake, lib=lib)
torch.library.register_vmap("egnn_fast::sort_by_receiver", _sort_vmap, lib=lib)
