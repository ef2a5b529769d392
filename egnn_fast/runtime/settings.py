"""Settings of the whole process that ``with`` blocks change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Entry(Generic[T]):
    """The value of an open block."""

    def __init__(self, value: T) -> None:
        self.value = value


class Blocks(Generic[T]):
    """The blocks that are open, in all threads; they may end in any order.

    Parameters
    ----------
    publish : callable, optional
        Called at each change with the value of the block entered last, None without any.
    """

    def __init__(self, publish: Callable[[T | None], None] = lambda value: None) -> None:
        self._open: list[Entry[T]] = []
        self._publish, self._lock = publish, threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def latest(self) -> T | None:
        """The value of the block entered last; None without any."""
        entries = self._open[-1:]  # one read: another thread may leave meanwhile
        return entries[0].value if entries else None

    def enter(self, value: T) -> Entry[T]:
        """Open a block."""
        entry = Entry(value)
        with self._lock:
            self._open.append(entry)
            self._publish(self.latest)
        return entry

    def leave(self, entry: Entry[T]) -> None:
        """Close a block, unless it is closed already."""
        with self._lock:
            self._open = [other for other in self._open if other is not entry]
            self._publish(self.latest)
