"""What an eviction policy is: it hears which slots were read and names slots to empty."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

Evictable = Callable[[Tensor], Tensor]
"""[N] slots to [N] bool: occupied and not pinned."""


class EvictionPolicy(ABC):
    """Batches of slots of one table, numbered 1 to `slots`. Tensors are int64 on the table's device."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.slots = slots
        self.device = device

    @abstractmethod
    def touch(self, slots: Tensor) -> None:
        """These slots were read; they may repeat."""

    @abstractmethod
    def admitted(self, slots: Tensor) -> None:
        """These slots hold new rows now."""

    @abstractmethod
    def victims(self, count: int, evictable: Evictable) -> Tensor:
        """Up to `count` distinct evictable slots, the ones to lose first; fewer only when no more are evictable."""


__all__ = ["Evictable", "EvictionPolicy"]
