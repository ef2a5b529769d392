"""How much memory a layer's call may keep for its backward beyond its inputs and outputs."""

from __future__ import annotations

import os
from types import TracebackType

ENV_BUDGET = "EGNN_FAST_ACTIVATION_BYTES"
DEFAULT_BUDGET = 64 << 20

# the last one holds; without any, the environment, else the default
_settings: list[set_activation_budget] = []
_from_outside: int | None = None


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
        self._num_bytes, self._entered = _check("num_bytes", num_bytes), 0
        # of those outside a block keep the last one: it holds again if this one is a block and ends
        for setting in [s for s in _settings if not s._entered][:-1]:
            _settings.remove(setting)
        _settings.append(self)

    def __enter__(self) -> None:
        self._entered += 1
        if self not in _settings:
            _settings.append(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered -= 1
        # blocks of several threads may end in any order
        if not self._entered:
            _settings.remove(self)


def activation_budget() -> int:
    """The budget of a layer's call in bytes."""
    global _from_outside
    latest = _settings[-1:]  # one step: another thread may leave meanwhile
    if latest:
        return latest[0]._num_bytes
    if _from_outside is None:
        _from_outside = _from_environment()
    return _from_outside


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
