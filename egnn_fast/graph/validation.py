"""Whether tensors make a graph that kernels may read.

By NumPy, which stays on one thread: PyTorch's threads hang in a forked child.
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


def check_tensors(tensors: Mapping[str, Any]) -> None:
    """Raise unless a Graph's tensors have its dtypes, and, where they can be read, fit each other.

    Raises
    ------
    TypeError, ValueError, IndexError
        A tensor is wrong; the message names it.
    """
    # pytree functions may put other objects in the tensors' places
    given = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    for name, t in given.items():
        if t.dtype is not DTYPES[name]:
            raise TypeError(f"{name}: expected {DTYPES[name]}, got {t.dtype}")
    if tracing() or any(t is not None and name not in given for name, t in tensors.items()):
        return
    for name, t in given.items():
        if t.dim() != 1:
            raise ValueError(f"{name}: expected 1 dimension, got shape {list(t.shape)}")
        if t.device != given["rowptr"].device:
            raise ValueError(
                f"{name}: expected device {given['rowptr'].device} as rowptr has, got {t.device}"
            )
    nodes = given["rowptr"].shape[0] - 1
    if nodes < 0:
        raise ValueError("rowptr: expected [N + 1], got [0]")
    if ("senders" in given) == ("first" in given):
        raise ValueError("senders: expected a tensor unless first is given, and None if it is")
    _check_length("first", given, nodes)
    edges = given["senders"].shape[0] if "senders" in given else None
    if edges is not None:
        _check_length("perm", given, edges)
    if all(t.device.type == "cpu" and is_plain(t) for t in given.values()):
        _check_values({name: t.numpy() for name, t in given.items()}, nodes, edges)


def _check_length(name: str, given: Mapping[str, Tensor], count: int) -> None:
    if name in given and given[name].shape[0] != count:
        raise ValueError(f"{name}: expected [{count}], got {list(given[name].shape)}")


def _check_values(given: Mapping[str, Any], nodes: int, edges: int | None) -> None:
    rowptr = given["rowptr"]
    degree = np.diff(rowptr)
    if rowptr[0] != 0 or (degree < 0).any():
        raise ValueError("rowptr: expected to start with 0 and not to decrease")
    if edges is not None and rowptr[-1] != edges:
        raise ValueError(f"rowptr: expected to end with {edges}, as senders has, got {rowptr[-1]}")
    _check_range("senders", given, nodes)
    _check_range("perm", given, int(rowptr[-1]))
    if "first" in given:
        _check_range("first", given, nodes)
        # a component's nodes are first, first + 1, ..., first + degree
        if ((given["first"] + degree >= nodes) & (degree > 0)).any():
            raise IndexError(f"first: a component reaches beyond the {nodes} nodes")


def _check_range(name: str, given: Mapping[str, Any], end: int) -> None:
    values = given.get(name)
    if values is not None and values.size and (values.min() < 0 or values.max() >= end):
        raise IndexError(
            f"{name}: expected indices from 0 to {end - 1}, got {values.min()} to {values.max()}"
        )
