"""Runs the edge pass of a call, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from torch import Tensor

from egnn_fast.backends.triton import staged
from egnn_fast.backends.triton.backward import Backward
from egnn_fast.backends.triton.call import Call, TooLarge
from egnn_fast.kernels.forward import launch_edge_forward

# how often the passes ran, how many of them in stages, and a layer's nodes before and after them
launches = {"forward": 0, "backward": 0, "staged": 0, "nodes": 0}


def in_stages_if_too_large(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, which makes a Call; once more if that was TooLarge."""

    @wraps(run)
    def inner(*args: Any) -> Any:
        try:
            return run(*args)
        except TooLarge:
            pass  # the memory of the first try is free once its exception is gone
        return run(*args)

    return inner


def run_forward(call: Call, m: Tensor, shift: Tensor | None) -> None:
    """Add to the sums M ``[N, H]`` and, if there is a head, X ``[N, D]``; there are edges."""
    if call.staged:
        staged.forward(call, m, shift)
        launches["forward"] += 1
        launches["staged"] += 1
        return
    part = call.part(0, call.num_edges)
    m_rows = call.rows(m, part.programs)
    x_rows = None if shift is None else call.rows(shift, part.programs)
    chunk = part.chunk(0, call.num_edges)
    with call.fitting():
        launch_edge_forward(call.plan, call.problem(part), m_rows, x_rows, chunk)
    call.finish(part.slots, m_rows, x_rows)
    launches["forward"] += 1


def run_backward(
    call: Call, g_m: Tensor | None, g_x: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    """A gradient for each differentiable input that is needed; there are edges."""
    kind = staged.Backward if call.staged else Backward
    gradients = kind(call, g_m, g_x, needed).run()
    launches["backward"] += 1
    launches["staged"] += call.staged
    return gradients
