"""Fills new tensors with NaN, so that elements that a kernel does not write are noticed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors inside the block: NaN if floating point, the largest integer otherwise.

    Replaces ``torch.empty``, ``torch.empty_like`` and ``Tensor.new_empty``.
    """
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            t = allocate(*args, **kwargs)
            if t.is_floating_point():
                return t.fill_(math.nan)
            return t.fill_(True if t.dtype == torch.bool else torch.iinfo(t.dtype).max)

        return call

    # as Any, because mypy lets no function of a module or class be replaced
    torch_module: Any = torch
    tensor_class: Any = Tensor
    torch_module.empty, torch_module.empty_like = poisoned(empty), poisoned(empty_like)
    tensor_class.new_empty = poisoned(new_empty)
    try:
        yield
    finally:
        torch_module.empty, torch_module.empty_like = empty, empty_like
        tensor_class.new_empty = new_empty
