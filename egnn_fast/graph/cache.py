"""Cached values, computed once from tensors that do not change.

Only what an ordinary call computes from plain tensors is cached: the tensors of a trace or
transform have no data afterwards. A cached value serves every later call, so it must not depend on
grad mode, inference mode, autocast or the default dtype and device of the call that computes it:
see :func:`leave_inference_mode`; the functions that compute name dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from egnn_fast.runtime.eager import is_plain, tracing, transforming

Values = dict[Any, tuple[Any, "_Made | None"]]


def leave_inference_mode() -> torch.inference_mode:
    """Leave inference mode: a cached value must serve training too."""
    return torch.inference_mode(False)


def cached(values: Values, key: Any, make: Callable[[], Any], device: torch.device) -> Any:
    """``make()``, cached under ``key`` if the call is ordinary.

    A value computed while a CUDA graph is captured is not cached: it has no data until the graph
    runs. If another stream computed the value, the current one waits for it.
    """
    # a trace must not depend on the calls before it
    if tracing():
        return make()
    found = values.get(key)
    if found is not None and found[1] is None:
        return found[0]
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if found is None:
        with leave_inference_mode():
            value = make()
        # a mode may have changed what was computed
        if capturing or transforming() or not all(is_plain(t) for t in _tensors(value)):
            return value
        # if two threads compute it at once, the first value stays
        values.setdefault(key, (value, _Made(device) if device.type == "cuda" else None))
    value, made = values[key]
    if made is not None and not capturing:  # before a capture the whole device is waited for
        made.await_by_current_stream(value)
    return value


# for each tensor, as long as it is alive: the values computed from it
_of_tensors = WeakTensorKeyDictionary()


def cached_for(tensor: Tensor, key: Any, make: Callable[[], Any]) -> Any:
    """``make()``, cached for this tensor under ``key`` until the tensor is written to.

    The value must depend on nothing else. See :func:`cached`.
    """
    if tracing():
        return make()
    return cached(_values_of(tensor), key, make, tensor.device)


def store_for(tensor: Tensor, key: Any, value: Any) -> None:
    """Let :func:`cached_for` find a value that is known already."""
    _values_of(tensor).setdefault(key, (value, None))


def _values_of(tensor: Tensor) -> Values:
    state = (0 if tensor.is_inference() else tensor._version, tensor.data_ptr())
    entry = _of_tensors.get(tensor)
    if entry is None or entry[0] != state:
        entry = (state, {})
        _of_tensors[tensor] = entry
    values: Values = entry[1]
    return values


class _Made:
    """When and on which stream something was computed."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)
        self.event = self.stream.record_event()

    def await_by_current_stream(self, value: Any) -> None:
        """Let the current stream wait for it, and its memory for the current stream."""
        current = torch.cuda.current_stream(self.stream.device)
        if current == self.stream:
            return
        current.wait_event(self.event)
        for t in _tensors(value):
            t.record_stream(current)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
