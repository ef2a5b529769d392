"""Caches of values that are computed from tensors that do not change.

Only ordinary calls on plain tensors (:mod:`egnn_fast.runtime.eager`) cache: the tensors of a trace
or transform have no data after it. Later calls in any state use a cached value, so it must not
depend on the grad mode, inference mode, autocast, default dtype or default device of the call that
computes it. Therefore inference mode is left for the computation, and the functions passed here
name dtype and device of what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from egnn_fast.runtime.eager import is_plain, tracing, transforming

# key -> (value, the CUDA event of its computation; None on the CPU)
Values = dict[Any, tuple[Any, "_Computation | None"]]


def leave_inference_mode() -> torch.inference_mode:
    """A context without inference mode: training cannot use tensors made inside that mode."""
    return torch.inference_mode(False)


def cached(values: Values, key: Any, make: Callable[[], Any], device: torch.device) -> Any:
    """``make()``, cached in ``values`` under ``key`` if the call is ordinary.

    Parameters
    ----------
    values : dict
        The cache.
    key : hashable
        What identifies the value in this cache.
    make : callable
        Computes the value: a tensor, a number or a tuple of these.
    device : torch.device
        Where the value is computed. On a GPU, a stream other than the one that computed the value
        waits for it. A value computed while a CUDA graph is captured is not cached: it has no
        data until the graph runs.
    """
    # a trace must not depend on the calls before it
    if tracing():
        return make()
    entry = values.get(key)
    if entry is not None and entry[1] is None:
        return entry[0]
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if entry is None:
        with leave_inference_mode():
            value = make()
        # a mode may have changed what was computed
        if capturing or transforming() or not all(is_plain(t) for t in _tensors_in(value)):
            return value
        # if two threads compute it at once, both use the value that was stored first
        values.setdefault(key, (value, _Computation(device) if device.type == "cuda" else None))
    value, computation = values[key]
    # PyTorch synchronises the device before a capture, so nothing is left to wait for
    if computation is not None and not capturing:
        computation.wait_on_current_stream(value)
    return value


# tensor -> ((version, address), the values computed from it), while the tensor is alive
_of_tensors = WeakTensorKeyDictionary()


def cached_for(tensor: Tensor, key: Any, make: Callable[[], Any]) -> Any:
    """``make()``, cached for this tensor under ``key`` until its version or address changes.

    The value must depend on nothing else. Writes to an inference tensor, which has no version, are
    not noticed. See :func:`cached`.
    """
    if tracing():
        return make()
    return cached(_values_of(tensor), key, make, tensor.device)


def store_for(tensor: Tensor, key: Any, value: Any) -> None:
    """Store a value that is known already, so that :func:`cached_for` returns it."""
    _values_of(tensor).setdefault(key, (value, None))


def _values_of(tensor: Tensor) -> Values:
    state = (0 if tensor.is_inference() else tensor._version, tensor.data_ptr())
    entry = _of_tensors.get(tensor)
    if entry is None or entry[0] != state:
        entry = (state, {})
        _of_tensors[tensor] = entry
    values: Values = entry[1]
    return values


class _Computation:
    """The CUDA stream on which a value was computed, and the event that marks its end."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)
        self.event = self.stream.record_event()

    def wait_on_current_stream(self, value: Any) -> None:
        """Make the current stream wait for the value, and keep its memory for that stream."""
        current = torch.cuda.current_stream(self.stream.device)
        if current == self.stream:
            return
        current.wait_event(self.event)
        for t in _tensors_in(value):
            t.record_stream(current)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors_in(part)
