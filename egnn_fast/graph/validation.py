"""Checks that tensors make a graph that kernels can read safely.

The values are checked in NumPy, which uses one thread: PyTorch's threads hang in a forked child.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from egnn_fast.runtime.eager import is_plain, tracing

DTYPES = {
    "rowptr": torch.int64, "senders": torch.int32, "perm": torch.int32, "first": torch.int32,
    "sizes": torch.int64,
}  # fmt: skip


def check_tensors(arguments: Mapping[str, Any]) -> None:
    """Check the tensors of a Graph, by the names in ``DTYPES``; absent ones are None.

    Dtypes are always checked, shapes and devices outside traces, values if all tensors are plain
    and on the CPU.

    Raises
    ------
    TypeError, ValueError, IndexError
        A tensor is wrong; the message names it.
    """
    # functions on pytrees may build a Graph of objects that are not tensors
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
    for name, t in tensors.items():
        if t.dtype is not DTYPES[name]:
            raise TypeError(f"{name}: expected {DTYPES[name]}, got {t.dtype}")
    if tracing() or any(t is not None and name not in tensors for name, t in arguments.items()):
        return
    for name, t in tensors.items():
        if t.dim() != 1:
            raise ValueError(f"{name}: expected 1 dimension, got shape {list(t.shape)}")
        if t.device != tensors["rowptr"].device:
            raise ValueError(
                f"{name}: expected device {tensors['rowptr'].device} as rowptr has, got {t.device}"
            )
    nodes = tensors["rowptr"].shape[0] - 1
    if nodes < 0:
        raise ValueError("rowptr: expected [N + 1], got [0]")
    if ("senders" in tensors) == ("first" in tensors):
        raise ValueError("senders: expected a tensor unless first is given, and None if it is")
    _check_length("first", tensors, nodes)
    edges = tensors["senders"].shape[0] if "senders" in tensors else None
    if edges is not None:
        _check_length("perm", tensors, edges)
    if all(t.device.type == "cpu" and is_plain(t) for t in tensors.values()):
        _check_values({name: t.numpy() for name, t in tensors.items()}, nodes, edges)


def _check_length(name: str, tensors: Mapping[str, Tensor], count: int) -> None:
    if name in tensors and tensors[name].shape[0] != count:
        raise ValueError(f"{name}: expected [{count}], got {list(tensors[name].shape)}")


def _check_values(arrays: Mapping[str, Any], nodes: int, edges: int | None) -> None:
    """Check the values of arrays whose shapes are right; ``edges`` is None for complete graphs."""
    rowptr = arrays["rowptr"]
    degree = np.diff(rowptr)
    if rowptr[0] != 0 or (degree < 0).any():
        raise ValueError("rowptr: expected to start with 0 and not to decrease")
    if edges is not None and rowptr[-1] != edges:
        raise ValueError(f"rowptr: expected to end with {edges}, as senders has, got {rowptr[-1]}")
    _check_range("senders", arrays, nodes)
    _check_range("perm", arrays, int(rowptr[-1]))
    if "first" in arrays:
        _check_range("first", arrays, nodes)
        # a component's nodes are first, first + 1, ..., first + degree
        if ((arrays["first"] + degree >= nodes) & (degree > 0)).any():
            raise IndexError(f"first: a component reaches beyond the {nodes} nodes")


def _check_range(name: str, arrays: Mapping[str, Any], end: int) -> None:
    values = arrays.get(name)
    if values is not None and values.size and (values.min() < 0 or values.max() >= end):
        raise IndexError(
            f"{name}: expected indices from 0 to {end - 1}, got {values.min()} to {values.max()}"
        )
