"""Edge lists and counts in every accepted form, and the errors for others.

Private names of PyTorch used here, seen in releases 2.11 to 2.13: ``torch._subclasses``,
``torch._C._DisableTorchDispatch`` and ``torch._C.DisableTorchFunctionSubclass``. Only edge lists of
a tensor subclass need them; without one of them such a call raises an ImportError or
AttributeError.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from egnn_fast.runtime.eager import PLAIN_TYPES, is_plain

EdgeIndexLike = Tensor | Sequence[Any] | np.ndarray[Any, Any]
INT32_MAX = 2**31 - 1


def as_edge_index(edge_index: EdgeIndexLike, device: torch.device | str = "cpu") -> Tensor:
    """An edge list of any accepted form as one int64 tensor ``[2, E]``.

    Tensors stay on their device; ``device`` is for lists of numbers and NumPy arrays.

    Raises
    ------
    TypeError, ValueError
        The edge list has the wrong type, dtype, layout or shape.
    """
    if isinstance(edge_index, np.ndarray):
        edges = _as_tensor(edge_index, device)
    elif isinstance(edge_index, Tensor):
        edges = unwrap_subclass(edge_index)
    else:
        edges = _stacked(edge_index, device)
    if edges.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"edge_index: expected int64 or int32, got {edges.dtype}")
    if edges.dim() != 2 or edges.shape[0] != 2:
        raise ValueError(f"edge_index: expected shape [2, E], got {list(edges.shape)}")
    if edges.layout != torch.strided:
        raise TypeError(f"edge_index: expected a dense tensor, got one of layout {edges.layout}")
    return edges.long()


def _stacked(edge_index: Any, device: torch.device | str) -> Tensor:
    """A pair (receivers, senders) as one tensor ``[2, E]``."""
    if not isinstance(edge_index, Sequence) or len(edge_index) != 2:
        raise TypeError(
            "edge_index: expected a Graph, a tensor or array [2, E] or a pair "
            f"(receivers, senders), got {type(edge_index).__name__}"
        )
    rows = [
        unwrap_subclass(row) if isinstance(row, Tensor) else _as_tensor(row, device)
        for row in edge_index
    ]
    if rows[0].shape != rows[1].shape or rows[0].dim() != 1:
        raise ValueError(
            "edge_index: receivers and senders must be 1-D and of the same length, "
            f"got {tuple(rows[0].shape)} and {tuple(rows[1].shape)}"
        )
    if rows[0].device != rows[1].device:
        raise ValueError(
            f"edge_index: receivers lie on {rows[0].device}, senders on {rows[1].device}"
        )
    # PyTorch makes a float tensor of an empty list
    return torch.stack([row.long() if row.numel() == 0 else row for row in rows])


def _as_tensor(values: Any, device: torch.device | str) -> Tensor:
    # a copy, because PyTorch rejects arrays with negative strides and warns of read-only ones
    values = values.copy() if isinstance(values, np.ndarray) else values
    try:
        return torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"edge_index: expected integers, got {type(values).__name__}: {error}"
        ) from error


def unwrap_subclass(tensor: Tensor) -> Tensor:
    """The plain tensor inside an instance of a subclass.

    Plain tensors and the tensors of a trace are returned as they are.

    Raises
    ------
    TypeError
        The subclass has neither memory of its own nor a method ``as_tensor()``.
    """
    if torch.compiler.is_compiling() or type(tensor) in PLAIN_TYPES or _is_traced(tensor):
        return tensor
    as_tensor = getattr(tensor, "as_tensor", None)  # PyTorch Geometric's EdgeIndex has it
    if as_tensor is not None:
        converted = as_tensor()
        if type(converted) in PLAIN_TYPES:
            return converted
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunctionSubclass():
        unwrapped = tensor.as_subclass(Tensor)
    if not is_plain(unwrapped):
        raise TypeError(
            f"edge_index: a {type(tensor).__name__} has no memory of its own that could be read; "
            "pass a plain tensor"
        )
    return unwrapped


def _is_traced(tensor: Tensor) -> bool:
    # imported here, because the import is slow and only subclasses need it
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, (FakeTensor, FunctionalTensor))


def check_totals(name: str, nodes: int, edges: int) -> None:
    """Raise ValueError if there are more nodes or edges than int32 can number."""
    if not torch.compiler.is_compiling() and (nodes > INT32_MAX or edges > INT32_MAX):
        raise ValueError(f"{name}: at most 2**31 - 1 nodes and edges, got {nodes} and {edges}")


def check_edge_count(edges: Tensor) -> None:
    """Raise ValueError if ``edges [2, E]`` has more edges than int32 can number."""
    if edges.shape[1] > INT32_MAX:
        raise ValueError(f"edge_index: at most 2**31 - 1 edges, got {edges.shape[1]}")


def as_count(name: str, value: Any) -> int:
    """``value`` as an int from 0 to 2**31 - 1; NumPy integers and 0-dim tensors are accepted.

    Raises
    ------
    TypeError, ValueError
        ``value`` is not an integer, or outside this range; the message begins with ``name``.
    """
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, int) and not isinstance(value, bool):
        count: int = value
    else:
        invalid = isinstance(value, bool)
        if isinstance(value, Tensor):
            invalid = value.dim() > 0 or value.dtype == torch.bool or value.is_floating_point()
        if invalid or not hasattr(value, "__index__"):
            raise TypeError(f"{name}: expected an int, got {value!r}")
        count = operator.index(value)
    # torch.compile would make a guard of a bound on a size; the sort operator checks when it runs
    if not torch.compiler.is_compiling() and not 0 <= count <= INT32_MAX:
        raise ValueError(f"{name}: expected 0 to 2**31 - 1, got {count}")
    return count


def as_counts(name: str, values: Any) -> list[int]:
    """A list of counts from a sequence of them or from a 1-D tensor or array of integers.

    Raises
    ------
    TypeError, ValueError
        As :func:`as_count` does, or the tensor or array is not 1-D of integers.
    """
    if isinstance(values, (Tensor, np.ndarray)):
        has_integers = (
            values.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
            if isinstance(values, Tensor)
            else values.dtype.kind in "iu"
        )
        if values.ndim != 1 or not has_integers:
            raise TypeError(
                f"{name}: expected a 1-D tensor of integers, got {values.dtype} "
                f"{tuple(values.shape)}"
            )
        values = values.tolist()
    return [as_count(name, value) for value in values]
