"""Whether a call is ordinary, and whether a tensor is plain: has memory that a kernel may read.

A call is ordinary if PyTorch just computes: no trace, transform or mode is active. Addresses are
taken, and results cached, in ordinary calls on plain tensors only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

P = ParamSpec("P")
R = TypeVar("R")

PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
PLAIN_OR_NONE = PLAIN_TYPES | {type(None)}


_TRACERS = tuple(torch._C._TorchDispatchModeKey.__members__.values())


def tracing() -> bool:
    """Whether the call is in a trace or transform, or on fake tensors.

    Such tensors may have no data: none is read by address, and no result is cached.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or (
            torch._C._len_torch_dispatch_stack() > 0
            and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)
        )
        # make_fx before dispatch, torch.export
        or (
            torch._C._len_torch_function_stack() > 0
            and any(kind.__module__.startswith("torch.") for kind in _function_modes())
        )
    )


def transforming() -> bool:
    """Whether the call is not ordinary: in a trace, a transform or any mode."""
    return tracing() or torch._C._len_torch_dispatch_stack() > 0 or bool(_function_modes())


def _function_modes() -> list[type]:
    """The active torch-function modes, except a default device.

    A default device (``torch.set_default_device``, ``with torch.device(...)``) is such a mode, but
    changes nothing here: every allocation in this package names its device.
    """
    modes = [
        type(torch._C._get_function_stack_at(k))
        for k in range(torch._C._len_torch_function_stack())
    ]
    return [mode for mode in modes if mode is not DeviceContext]


def refuse_jit_trace() -> None:
    """Raise RuntimeError under ``torch.jit.trace``, which would record results as constants."""
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "egnn_fast: torch.jit.trace is not supported; use torch.export.export or torch.compile"
        )


def only_default_device() -> bool:
    """Whether a default device is the only active torch-function mode."""
    return torch._C._len_torch_function_stack() > 0 and not _function_modes()


def without_default_device(function: Callable[P, R]) -> Callable[P, R]:
    """Switch a default device off inside ``function``, whose allocations name their devices.

    A default device is a mode in Python: each function and attribute of a tensor takes 1.5 µs
    longer. It stays on if an argument is a tensor subclass or a callable, which may need it. In a
    backward it is off already: PyTorch calls ``torch.autograd`` without it.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not only_default_device():
            return function(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            for t in value if isinstance(value, (tuple, list)) else (value,):
                if callable(t) or (isinstance(t, Tensor) and type(t) not in PLAIN_TYPES):
                    return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return call


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is plain: a kernel may read its memory by address.

    Not plain are subclasses, fake and functional tensors, wrappers of transforms, lazily negated
    tensors, layouts other than strided, and freed memory. Off the CPU the type alone decides.
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
