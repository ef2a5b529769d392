"""Whether a call is an ordinary one, and whether a tensor has memory that a kernel may read.

A call is ordinary if PyTorch just computes: nothing traces, transforms or rewrites the program.
Addresses are taken, and results kept for later calls, in ordinary calls on plain tensors only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves

P = ParamSpec("P")
R = TypeVar("R")

PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
PLAIN_OR_NONE = PLAIN_TYPES | {type(None)}


def transforming() -> bool:
    """Whether the program is being traced, transformed or watched by a mode, not just run.

    A default device (``torch.set_default_device``, ``with torch.device(...)``) is a mode too, but
    changes nothing here: every allocation in this package names its device.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or (torch._C._len_torch_function_stack() > 0 and not only_default_device())
    )


def refuse_jit_trace() -> None:
    """Raise RuntimeError under ``torch.jit.trace``, which would record results as constants."""
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "egnn_fast: torch.jit.trace is not supported; use torch.export.export or torch.compile"
        )


def only_default_device() -> bool:
    """Whether a default device is set, and no other mode watches calls of PyTorch's functions."""
    count = torch._C._len_torch_function_stack()
    return count > 0 and all(
        type(torch._C._get_function_stack_at(k)) is DeviceContext for k in range(count)
    )


def without_default_device(function: Callable[P, R]) -> Callable[P, R]:
    """Let a default device make no call of ``function`` slower, which names the device it uses.

    A default device is a mode in Python: each function and attribute of a tensor takes 1.5 µs
    longer. It stays on for tensor subclasses, whose functions may ask for it, and for callables.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not only_default_device():
            return function(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        if any(
            callable(t) or (isinstance(t, Tensor) and type(t) not in PLAIN_TYPES) for t in given
        ):
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return call


def is_plain(tensor: Any) -> bool:
    """Whether a tensor on the CPU is one with memory of its own, in the state its type says.

    Not so: subclasses, fake and functional tensors, the transforms' wrappers, lazily negated ones,
    other layouts than strided, memory that was freed. Those on other devices are judged by type.
    """
    if type(tensor) not in PLAIN_TYPES:
        return False
    if tensor.device.type != "cpu":
        return True
    keys: int = torch._C._dispatch_keys(tensor).raw_repr()
    return keys in _PLAIN_KEYS and (tensor.data_ptr() != 0 or tensor.numel() == 0)


def _keys(inference: bool) -> int:
    with torch.inference_mode(inference):
        keys: int = torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()
    return keys


_PLAIN_KEYS = (_keys(False), _keys(True))
