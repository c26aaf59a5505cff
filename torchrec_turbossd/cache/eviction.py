"""What an eviction policy is: it hears what happens to slots and names slots to empty."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

Evictable = Callable[[Tensor], Tensor]
"""[N] slots to [N] bool: occupied and not pinned; slot 0 never is."""


class EvictionPolicy(ABC):
    """Batches of slots of one table, numbered 1 to `slots`. Tensors are int64 on the CPU.

    A policy may see only some of the slots: those that are never admitted are never victims.

    Attributes:
        bytes_per_slot: memory that the policy keeps for each slot.
    """

    bytes_per_slot: ClassVar[int]

    def __init__(self, slots: int) -> None:
        self.slots = slots

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the policy keeps: `bytes_per_slot` for slots 0 to `slots`."""

    @abstractmethod
    def touch(self, slots: Tensor) -> None:
        """These slots were read; they may repeat."""

    @abstractmethod
    def admitted(self, slots: Tensor, ids: Tensor) -> None:
        """These slots hold new rows now, those of `ids`."""

    @abstractmethod
    def victims(self, count: int, evictable: Evictable) -> Tensor:
        """Up to `count` distinct evictable slots, the ones to lose first; fewer only when no more are evictable.

        The caller may still decide to keep them.
        """

    def evicted(self, slots: Tensor, ids: Tensor) -> None:  # noqa: B027
        """The rows `ids` left these slots as victims."""

    def released(self, slots: Tensor) -> None:  # noqa: B027
        """These slots were emptied for another reason than eviction."""

    @abstractmethod
    def moved(self, old: Tensor, new: Tensor) -> None:
        """The rows of slots `old` [N] are in the empty slots `new` [N] now, as popular as they were."""

    @abstractmethod
    def heat(self) -> Tensor:
        """For each slot 0 to `slots` how reluctantly it would be emptied: [slots + 1] int64, larger is hotter."""


__all__ = ["Evictable", "EvictionPolicy"]
