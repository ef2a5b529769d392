"""Graphs of raw edge lists: a layer called again with the same tensor does not sort it again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from egnn_fast.graph import Graph, sorting
from egnn_fast.graph.edge_lists import EdgeIndexLike, unwrap_subclass
from egnn_fast.runtime import native
from egnn_fast.runtime.eager import is_plain, tracing, transforming


class _Entry(NamedTuple):
    """A cached graph and what must be unchanged for it to be used again.

    ``fingerprints`` has one entry for each tensor of the edge list; ``second`` refers to the
    senders' tensor if the edge list is a pair.
    """

    fingerprints: list[Any]
    second: weakref.ref[Tensor] | None
    num_nodes: int
    graph: Graph


# one entry for each edge list, under its first tensor and for as long as that is alive
_entries = WeakTensorKeyDictionary()


def graph_of(edge_index: EdgeIndexLike, num_nodes: int) -> Graph:
    """The Graph of an edge list; cached if the list is a CPU tensor or a pair of them.

    The tensors are looked up by identity. Each call compares a 64-bit checksum of their content
    with the stored one, so any edit is noticed. The checksum takes about a tenth of the sort's
    time, at least 5 µs. Lists of numbers, arrays and tensors on other devices are sorted at each
    call.

    Raises
    ------
    TypeError, ValueError, IndexError
        As :meth:`Graph.from_edge_index` does.
    """
    core = native.core
    if core is None or tracing():
        return Graph.from_edge_index(edge_index, num_nodes)
    tensors: Sequence[Any] = ()
    if isinstance(edge_index, Tensor):
        tensors = (edge_index,)
    elif isinstance(edge_index, Sequence) and len(edge_index) == 2:
        tensors = edge_index
    fingerprints = [_fingerprint(core, t) for t in tensors]
    if not fingerprints or None in fingerprints:
        return Graph.from_edge_index(edge_index, num_nodes)
    second = tensors[1] if len(tensors) > 1 else None
    entry: _Entry | None = _entries.get(tensors[0])
    if (
        entry is not None
        and entry.num_nodes == num_nodes
        and entry.fingerprints == fingerprints
        and (entry.second() if entry.second is not None else None) is second
    ):
        return entry.graph
    graph = Graph.from_edge_index(edge_index, num_nodes)
    if transforming():  # a mode may have changed what was computed
        return graph
    reference = None if second is None else weakref.ref(second)
    _entries[tensors[0]] = _Entry(fingerprints, reference, num_nodes, graph)
    return graph


def _fingerprint(core: native.Core, tensor: Any) -> tuple[Any, ...] | None:
    """Dtype, shape, strides and checksum of a tensor; None if its memory cannot be read."""
    if not isinstance(tensor, Tensor):
        return None
    tensor = unwrap_subclass(tensor)
    if not tensor.is_cpu or not is_plain(tensor):
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), sorting.checksum(core, tensor)
