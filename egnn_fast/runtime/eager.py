"""Whether a call is ordinary and whether a tensor is plain.

A call is ordinary if no trace, transform or mode is active: PyTorch only computes. A tensor is
plain if a kernel may read its memory by address. Only ordinary calls on plain tensors read
addresses and cache results.

Private names of PyTorch used here, seen in releases 2.11 to 2.13. In a release without one of them:

- ``torch.utils._device.DeviceContext``: ImportError when this module is imported.
- ``torch._C._TorchDispatchModeKey``, ``torch._C._dispatch_keys``: AttributeError when this module
  is imported.
- ``torch._C._are_functorch_transforms_active``, ``_get_tracing_state``,
  ``_len_torch_dispatch_stack``, ``_len_torch_function_stack``: AttributeError at every call.
- ``torch._C._get_dispatch_mode``, ``_get_function_stack_at``: AttributeError at calls inside a
  mode. ``torch._C.DisableTorchFunction``: AttributeError at calls with a default device.
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

# the types that a plain tensor may have; subclasses may have no memory of their own
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
PLAIN_OR_NONE = PLAIN_TYPES | {type(None)}

# keys of the modes by which PyTorch itself traces: fake tensors, proxies, functionalisation
_TRACING_MODE_KEYS = tuple(torch._C._TorchDispatchModeKey.__members__.values())


def tracing() -> bool:
    """Whether the call is in a trace or transform, or on fake tensors.

    Such tensors may have no data, so none is read by address and no result is cached.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or (
            torch._C._len_torch_dispatch_stack() > 0
            and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING_MODE_KEYS)
        )
        # make_fx(pre_dispatch=True) and torch.export trace by a torch-function mode
        or (
            torch._C._len_torch_function_stack() > 0
            and any(kind.__module__.startswith("torch.") for kind in _function_modes())
        )
    )


def transforming() -> bool:
    """Whether the call is not ordinary: in a trace, a transform or any mode."""
    return tracing() or torch._C._len_torch_dispatch_stack() > 0 or bool(_function_modes())


def _function_modes() -> list[type]:
    """The types of the active torch-function modes, except a default device.

    A default device (``torch.set_default_device``, ``with torch.device(...)``) is such a mode. It
    has no effect here, because every allocation in this package names its device.
    """
    modes = [
        type(torch._C._get_function_stack_at(k))
        for k in range(torch._C._len_torch_function_stack())
    ]
    return [mode for mode in modes if mode is not DeviceContext]


def refuse_jit_trace() -> None:
    """Raise RuntimeError under ``torch.jit.trace``, which would record results as constants.

    Raises
    ------
    RuntimeError
        ``torch.jit.trace`` is active.
    """
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "egnn_fast: torch.jit.trace is not supported; use torch.export.export or torch.compile"
        )


def _only_default_device() -> bool:
    """Whether a default device is the only active torch-function mode."""
    return torch._C._len_torch_function_stack() > 0 and not _function_modes()


def without_default_device(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator that switches a default device off inside ``function``, to save time.

    A default device is a mode written in Python: with it, each access to a tensor's functions and
    attributes takes 1.5 µs longer. All allocations in ``function`` must name their devices. The
    mode stays on if an argument is a tensor subclass or a callable, which may depend on it. In a
    backward it is off already, because PyTorch runs ``torch.autograd`` without it.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not _only_default_device():
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

    Subclasses are not plain. On the CPU these are not plain either: fake and functional tensors,
    tensors wrapped by a transform, lazily negated tensors, layouts other than strided, and tensors
    whose memory was freed. On other devices only the type is checked.
    """
    if type(tensor) not in PLAIN_TYPES:
        return False
    if tensor.device.type != "cpu":
        return True
    keys: int = torch._C._dispatch_keys(tensor).raw_repr()
    return keys in _PLAIN_KEYS and (tensor.data_ptr() != 0 or tensor.numel() == 0)


def _plain_keys(inference: bool) -> int:
    """The dispatch keys of an ordinary CPU tensor made with or without inference mode."""
    with torch.inference_mode(inference):
        keys: int = torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()
    return keys


_PLAIN_KEYS = (_plain_keys(False), _plain_keys(True))
