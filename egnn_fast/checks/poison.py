"""Fresh memory that shows what was not written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, and integers far out of range: what is not written shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def spoiling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spoiled(*args: Any, **kwargs: Any) -> Tensor:
            fresh = make(*args, **kwargs)
            if fresh.is_floating_point():
                return fresh.fill_(math.nan)
            return fresh.fill_(True if fresh.dtype == torch.bool else torch.iinfo(fresh.dtype).max)

        return spoiled

    changed: Any = torch, Tensor
    changed[0].empty, changed[0].empty_like = spoiling(empty), spoiling(empty_like)
    changed[1].new_empty = spoiling(new_empty)
    try:
        yield
    finally:
        changed[0].empty, changed[0].empty_like = empty, empty_like
        changed[1].new_empty = new_empty
