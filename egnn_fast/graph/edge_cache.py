"""Graphs of raw edge lists, so that a layer called again with the same tensor does not sort it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from egnn_fast.graph import Graph, sorting
from egnn_fast.graph.edge_lists import EdgeIndexLike, with_memory
from egnn_fast.runtime import native
from egnn_fast.runtime.eager import is_plain, tracing, transforming


class _Entry(NamedTuple):
    content: list[Any]
    second: weakref.ref[Tensor] | None
    num_nodes: int
    graph: Graph


# one entry an edge list, alive as long as its (first) tensor is
_entries = WeakTensorKeyDictionary()


def graph_of(edge_index: EdgeIndexLike, num_nodes: int) -> Graph:
    """The graph of an edge list; that of a tensor (or pair of tensors) on the CPU is cached.

    The tensor is found by identity, and a 64-bit checksum of its content is compared at each call,
    so that an edit is noticed, whatever made it. The checksum takes about a tenth of the sort's
    time, 5 µs at least. Lists of numbers, arrays and tensors on other devices are always sorted.
    """
    core = native.core
    if core is None or tracing():
        return Graph.from_edge_index(edge_index, num_nodes)
    tensors: Sequence[Any] = ()
    if isinstance(edge_index, Tensor):
        tensors = (edge_index,)
    elif isinstance(edge_index, Sequence) and len(edge_index) == 2:
        tensors = edge_index
    content = [_content(core, t) for t in tensors]
    if not content or None in content:
        return Graph.from_edge_index(edge_index, num_nodes)
    second = tensors[1] if len(tensors) > 1 else None
    entry: _Entry | None = _entries.get(tensors[0])
    if (
        entry is not None
        and entry.num_nodes == num_nodes
        and entry.content == content
        and (entry.second() if entry.second is not None else None) is second
    ):
        return entry.graph
    graph = Graph.from_edge_index(edge_index, num_nodes)
    if transforming():  # a mode may have changed what was computed
        return graph
    reference = None if second is None else weakref.ref(second)
    _entries[tensors[0]] = _Entry(content, reference, num_nodes, graph)
    return graph


def _content(core: native.Core, tensor: Any) -> tuple[Any, ...] | None:
    """Dtype, shape, strides and checksum of a tensor; None if its memory cannot be read."""
    if not isinstance(tensor, Tensor):
        return None
    tensor = with_memory(tensor)
    if not tensor.is_cpu or not is_plain(tensor):
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), sorting.checksum(core, tensor)
