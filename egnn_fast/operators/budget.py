"""How much memory a layer's call may use to store activations for its backward."""

from __future__ import annotations

import os
from types import TracebackType

ENV_BUDGET = "EGNN_FAST_ACTIVATION_BYTES"
DEFAULT_BUDGET = 64 << 20

# calls and open blocks; the last one holds
_settings: list[set_activation_budget] = []
# holds if there are none: from the environment or the default, read when first needed
_from_outside: int | None = None


class set_activation_budget:
    """Limit the memory in which a layer's call stores activations for its backward.

    A call whose activations fit stores them, and its backward does not compute them again; another
    call stores none. The results are the same. The budget takes effect at once for the whole
    process or, as a context manager, for a block. Without any call of this the budget is
    ``EGNN_FAST_ACTIVATION_BYTES``, or 64 MiB if that is not set.

    Parameters
    ----------
    num_bytes : int
        The budget of each call of a layer in bytes. 0: never store activations.

    Raises
    ------
    TypeError, ValueError
        ``num_bytes`` is not an int, or negative.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes, self._entered = _check("num_bytes", num_bytes), 0
        # remove all calls outside a block except the last one, which holds again after this block
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
        # by value, not the last one: blocks of several threads may end in any order
        if not self._entered:
            _settings.remove(self)


def activation_budget() -> int:
    """The budget of a layer's call in bytes.

    Raises
    ------
    ValueError
        ``EGNN_FAST_ACTIVATION_BYTES`` is not a number of bytes.
    """
    global _from_outside
    # a slice, not a check and an index: another thread may close a block in between
    latest = _settings[-1:]
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
