"""Settings of the whole process that ``with`` blocks change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Entry(Generic[T]):
    """An open block; its identity tells blocks of the same value apart."""

    def __init__(self, value: T) -> None:
        self.value = value


class Blocks(Generic[T]):
    """The open ``with`` blocks of one setting in all threads; they may end in any order.

    Parameters
    ----------
    publish : callable, optional
        Called whenever a block opens or closes, with the value of the open block that was entered
        last, or None if none is open.
    """

    def __init__(self, publish: Callable[[T | None], None] = lambda value: None) -> None:
        self._open: list[Entry[T]] = []
        self._publish, self._lock = publish, threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def latest(self) -> T | None:
        """The value of the open block that was entered last; None if none is open."""
        # a slice, not a check and an index: another thread may close a block in between
        entries = self._open[-1:]
        return entries[0].value if entries else None

    def enter(self, value: T) -> Entry[T]:
        """Open a block; returns what :meth:`leave` takes."""
        entry = Entry(value)
        with self._lock:
            self._open.append(entry)
            self._publish(self.latest)
        return entry

    def leave(self, entry: Entry[T]) -> None:
        """Close a block; does nothing if it is closed already."""
        with self._lock:
            self._open = [other for other in self._open if other is not entry]
            self._publish(self.latest)
