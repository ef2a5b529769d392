"""What waits to be run: taken in order, as far as time and the GPU's memory allow."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from bench.gpu.setting import Item

_AHEAD = 8  # how far a worker looks for an item of its own variant, which needs no new process
_WAKE = 1.0  # seconds after which a waiting worker looks at the clock


class Queue:
    """Items for several workers.

    Parameters
    ----------
    items : sequence of Item
        In the order of their importance.
    deadline : float
        By ``time.monotonic``.
    gigabytes : float
        Memory that running items may take together; a larger item runs alone.

    Attributes
    ----------
    left : list of Item
        What time did not suffice for, or what was not taken before :meth:`close`.
    """

    def __init__(self, items: Sequence[Item], deadline: float, gigabytes: float) -> None:
        self.left: list[Item] = []
        self._waiting, self._deadline = list(items), deadline
        self._free, self._running = gigabytes, 0
        self._changed = threading.Condition()

    def take(self, variant: str) -> Item | None:
        """The next item, of this variant if one is near; waits for memory; None: there is none."""
        with self._changed:
            while True:
                self._drop()
                if not self._waiting:
                    return None
                fitting = [
                    item for item in self._waiting
                    if item.gigabytes <= self._free or not self._running
                ]  # fmt: skip
                if fitting:
                    near = [item for item in fitting[:_AHEAD] if item.variant == variant]
                    item = (near or fitting)[0]
                    self._waiting.remove(item)
                    self._free -= item.gigabytes
                    self._running += 1
                    return item
                self._changed.wait(_WAKE)

    def give_back(self, item: Item) -> None:
        """An item has ended, its memory is free."""
        with self._changed:
            self._free += item.gigabytes
            self._running -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more is to be taken."""
        with self._changed:
            self.left += self._waiting
            self._waiting.clear()
            self._changed.notify_all()

    def _drop(self) -> None:
        late = [i for i in self._waiting if time.monotonic() + i.seconds > self._deadline]
        self.left += late
        self._waiting = [item for item in self._waiting if item not in late]
