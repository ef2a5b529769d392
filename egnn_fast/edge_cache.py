"""Graphs of raw edge lists, so that a layer called again with the same tensor does not sort it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from egnn_fast.graph import EdgeIndexLike, Graph


class _Entry(NamedTuple):
    states: tuple[tuple[int, int, torch.Size], ...]
    second: weakref.ref[Tensor] | None
    num_nodes: int
    graph: Graph


# one entry an edge list, alive as long as its (first) tensor is
_entries = WeakTensorKeyDictionary()


def graph_of(edge_index: EdgeIndexLike, num_nodes: int) -> Graph:
    """The graph of an edge list, sorted at the first call with it.

    The same tensor (or pair of tensors) is recognised by identity, an edit in place by PyTorch's
    version counter, and other memory under the tensor (``tensor.data = ...``) by its address.
    Lists of numbers and inference tensors keep no such counter and are sorted at each call.
    Writing through a NumPy view leaves no trace: pass a new tensor then.
    """
    tensors = _tensors(edge_index)
    if not tensors:
        return Graph.from_edge_index(edge_index, num_nodes)
    states = tuple((t._version, t.data_ptr(), t.shape) for t in tensors)
    second = tensors[1] if len(tensors) > 1 else None
    entry: _Entry | None = _entries.get(tensors[0])
    if (
        entry is not None
        and entry.states == states
        and entry.num_nodes == num_nodes
        and (entry.second is None if second is None else _refers(entry.second, second))
    ):
        return entry.graph
    graph = Graph.from_edge_index(edge_index, num_nodes)
    reference = None if second is None else weakref.ref(second)
    _entries[tensors[0]] = _Entry(states, reference, num_nodes, graph)
    return graph


def _refers(reference: weakref.ref[Tensor] | None, tensor: Tensor) -> bool:
    return reference is not None and reference() is tensor


def _tensors(edge_index: EdgeIndexLike) -> tuple[Tensor, ...]:
    """The tensors whose identity and version stand for the edge list; none if it has no such."""
    if isinstance(edge_index, Tensor):
        tensors: tuple[Tensor, ...] = (edge_index,)
    elif isinstance(edge_index, Sequence) and all(isinstance(row, Tensor) for row in edge_index):
        tensors = tuple(edge_index)
    else:
        return ()
    return () if any(t.is_inference() for t in tensors) else tensors
