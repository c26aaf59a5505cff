"""The empty slots of one table: those given back, in order, and those never used, as a range."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class FreeSlots:
    """Slot numbers without a row; costs nothing for slots never used.

    Args:
        first, last: slots never used yet, both included; none when `first > last`.
    """

    def __init__(self, first: int, last: int, device: torch.device) -> None:
        self._first, self._last, self._device = first, last, device
        self._given: deque[Tensor] = deque()
        self._given_count = 0
        self.version = 0
        """Another number whenever other slots may be free."""

    def __len__(self) -> int:
        return self._given_count + self._last - self._first + 1

    def peek(self, count: int) -> Tensor:
        """The next `count` slots, fewer when there are no more: [N] int64. They stay free."""
        parts, left = [], count
        for part in self._given:
            if left <= 0:
                break
            parts.append(part[:left])
            left -= part.numel()
        if left > 0 or not parts:
            parts.append(self._range(left))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _range(self, count: int) -> Tensor:
        stop = min(self._first + max(count, 0), self._last + 1)
        return torch.arange(self._first, stop, dtype=torch.int64, device=self._device)

    def take(self, count: int) -> Tensor:
        """The same, free no more."""
        taken = self.peek(count)
        self.version += 1
        left = taken.numel()
        while left and self._given:
            part = self._given.popleft()
            used = min(left, part.numel())
            left -= used
            self._given_count -= used
            if used < part.numel():
                self._given.appendleft(part[used:])
        self._first += left
        return taken

    def give(self, slots: Tensor) -> None:
        """These distinct slots [N] int64 are free."""
        if slots.numel():
            self.version += 1
            self._given.append(slots)
            self._given_count += slots.numel()

    def all(self) -> Tensor:
        """Every free slot."""
        return self.peek(len(self))


__all__ = ["FreeSlots"]
