"""How much memory a layer's call may keep for its backward beyond its inputs and outputs."""

from __future__ import annotations

import os
from types import TracebackType

ENV_BUDGET = "EGNN_FAST_ACTIVATION_BYTES"
DEFAULT_BUDGET = 64 << 20

_budget: int | None = None  # None: the environment, else the default


class set_activation_budget:
    """Bound what a layer's call may keep of its activations for the backward.

    A layer that fits keeps them and saves their recomputation; one that does not keeps nothing.
    The results are the same. Takes effect at once, for the whole process; as a context manager,
    for a block. Before the first call ``EGNN_FAST_ACTIVATION_BYTES`` holds, else 64 MiB.

    Parameters
    ----------
    num_bytes : int
        The budget of each call of a layer, in bytes; 0: never keep anything.

    Raises
    ------
    TypeError, ValueError
        ``num_bytes`` is no int, or negative.
    """

    def __init__(self, num_bytes: int) -> None:
        global _budget
        checked = _check("num_bytes", num_bytes)
        self._before = _budget
        _budget = checked

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _budget
        _budget = self._before


def activation_budget() -> int:
    """The budget of a layer's call in bytes."""
    global _budget
    if _budget is None:
        _budget = _from_environment()
    return _budget


def _from_environment() -> int:
    text = os.environ.get(ENV_BUDGET)
    if text is None:
        return DEFAULT_BUDGET
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{ENV_BUDGET}: expected a number of bytes, got {text!r}") from None
    return _check(ENV_BUDGET, value)


def _check(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")
    return value
