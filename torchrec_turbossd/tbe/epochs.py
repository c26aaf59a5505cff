"""Which uses are in flight, and what may be used again only once those begun before have ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Epochs(Generic[Item]):
    """Epoch-based reclamation (K. Fraser, "Practical lock-freedom", 2004). The owner holds a lock around every call."""

    def __init__(self) -> None:
        self._now = 0
        self._active: dict[int, int] = {}
        self._limbo: deque[tuple[int, Item]] = deque()

    @property
    def idle(self) -> bool:
        """Nothing is in flight."""
        return not self._active

    def enter(self) -> int:
        """A use begins; returns the epoch to `leave`."""
        self._active[self._now] = self._active.get(self._now, 0) + 1
        return self._now

    def leave(self, epoch: int) -> None:
        """A use ends."""
        if self._active[epoch] == 1:
            del self._active[epoch]
        else:
            self._active[epoch] -= 1

    def retire(self, item: Item) -> None:
        """Keep `item` until every use that is in flight now has ended; later ones do not count."""
        self._limbo.append((self._now, item))
        self._now += 1

    def since(self, epoch: int) -> Iterator[Item]:
        """What was retired after the use of `epoch` began, in order."""
        return (item for when, item in self._limbo if when >= epoch)

    def matured(self) -> list[Item]:
        """Take out what nothing in flight can use any more."""
        # Epochs begin in order, so the first key is the oldest.
        oldest = next(iter(self._active), None)
        done = []
        while self._limbo and (oldest is None or self._limbo[0][0] < oldest):
            done.append(self._limbo.popleft()[1])
        return done


__all__ = ["Epochs"]
