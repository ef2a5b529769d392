"""Which backend the user asked for: by argument, by context or by environment variable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from egnn_fast.runtime.backend_names import AUTO, BACKENDS
from egnn_fast.runtime.settings import Blocks, Entry

ENV_BACKEND = "EGNN_FAST_BACKEND"

# the open blocks of this thread or asyncio task
_override: ContextVar[tuple[Entry[str], ...]] = ContextVar("egnn_fast_backend", default=())
# what traced code reads: Dynamo cannot read a ContextVar, but guards on a global
_traced_override: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every layer inside the block on the named backend.

    The block takes precedence over ``EGNN_FAST_BACKEND``. A ``backend=`` argument other than None
    and ``"auto"`` takes precedence over the block. A block holds in its own thread or asyncio task;
    compiled code uses the block that was entered last in any thread. A checkpoint that is
    recomputed after the block uses the backend that is set then, and PyTorch may raise an error:
    pass ``backend=`` to the layer instead.

    Parameters
    ----------
    name : str
        ``"auto"``, or a backend that :func:`egnn_fast.info` lists.

    Raises
    ------
    ValueError
        No backend has this name.
    """
    block = _blocks.enter(check_name(name, "name"))
    _override.set((*_override.get(), block))
    try:
        yield
    finally:
        _blocks.leave(block)
        # blocks in generators may end in any order, and in another context than they began in
        _override.set(tuple(other for other in _override.get() if other is not block))


def _publish(name: str | None) -> None:
    global _traced_override
    _traced_override = name


_blocks: Blocks[str] = Blocks(_publish)


def check_name(name: str, argument: str) -> str:
    """``name`` if it is "auto" or the name of a backend.

    Raises
    ------
    ValueError
        It is neither; the message begins with ``argument``.
    """
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"{argument}: expected 'auto' or one of {BACKENDS}, got {name!r}")
    return name


def requested(argument: str | None) -> str:
    """The backend that the user asked for, or "auto".

    The argument decides unless it is None or ``"auto"``, then the open block, then the environment.

    Raises
    ------
    ValueError
        No backend has the name that was asked for.
    """
    if argument is not None and argument != AUTO:
        return check_name(argument, "backend")
    if torch.compiler.is_compiling():
        if _traced_override is not None:
            return _traced_override
    elif override := _override.get():
        return override[-1].value
    return check_name(os.environ.get(ENV_BACKEND, AUTO), ENV_BACKEND)
