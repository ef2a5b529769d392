"""Registers Graph with PyTorch: as a pytree node, for ``DataLoader`` and for safe checkpoints.

Private names of PyTorch used here, seen in releases 2.11 to 2.13: ``register_pytree_node`` and
``GetAttrKey`` of ``torch.utils._pytree``, and ``torch.utils.data._utils.collate``. In a release
without one of them the import of :mod:`egnn_fast.graph` raises an ImportError.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import GetAttrKey, register_pytree_node
from torch.utils.data._utils.collate import default_collate_fn_map

from egnn_fast.graph.validation import DTYPES

if TYPE_CHECKING:
    from egnn_fast.graph import Graph


def register(graph_class: type[Graph]) -> None:
    """Let PyTorch see the tensors of a Graph, batch Graphs and load them from checkpoints."""

    def flatten(graph: Graph) -> tuple[list[Any], None]:
        return [getattr(graph, name) for name in DTYPES], None

    def flatten_with_keys(graph: Graph) -> tuple[list[tuple[Any, Any]], None]:
        return [(GetAttrKey(name), getattr(graph, name)) for name in DTYPES], None

    def unflatten(tensors: Iterable[Any], context: None) -> Graph:
        return graph_class(*tensors)

    def collate(graphs: list[Graph], *, collate_fn_map: object = None) -> Graph:
        return graph_class.batch(graphs)

    # make_fx and torch.export take the tensors of a Graph argument as inputs
    register_pytree_node(
        graph_class, flatten, unflatten,
        serialized_type_name="egnn_fast.Graph", flatten_with_keys_fn=flatten_with_keys,
    )  # fmt: skip
    default_collate_fn_map[graph_class] = collate
    # files name the class so, whatever file of the package it stands in
    graph_class.__module__ = "egnn_fast.graph"
    # torch.load(..., weights_only=True) accepts these classes only
    torch.serialization.add_safe_globals([graph_class])
