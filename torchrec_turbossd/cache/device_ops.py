"""The operations of a device-resident cache on whole batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_turbossd.cache.device_queues import empty_slots, enqueue_slots
from torchrec_turbossd.cache.device_state import Batch, DeviceState

Given = Sequence[Tensor]
"""For each table, free slots [N] int64."""


class DeviceOps(ABC):
    """One batch at a time: what `remap` listed is what the others work on. They run on the current stream.

    Attributes:
        report: what the last `remap` found, once it has run: flags, then for each feature the rows that the DRAM tier
            has, those that are absent, and where its lookups end; [1 + 3 * features] int32 on the host.
        short: for each table, rows that the last `choose` has found no slot for, once it has run: [tables] int32 there.
    """

    def __init__(self, state: DeviceState) -> None:
        self.state = state
        pinned = state.device.type == "cuda"
        features = len(state.feature_table)
        words = 1 + 3 * features + len(state.rows)
        self._report = torch.zeros(words, dtype=torch.int32, pin_memory=pinned)
        self.report = self._report.numpy()[: 1 + 3 * features]
        self.short = self._report.numpy()[1 + 3 * features :]

    def locate(self) -> None:  # noqa: B027
        """The state's tensors are others now."""

    @abstractmethod
    def remap(self, batch: Batch) -> None:
        """Set `batch.slots`, touch them, list and claim each row that is in none once."""

    @abstractmethod
    def absent(self, batch: Batch) -> list[Tensor]:
        """For each feature, the listed rows that are in no tier: [N] int64."""

    @abstractmethod
    def choose(self, batch: Batch, given: Given, oldest: int) -> None:
        """A slot for each listed row of the DRAM tier: the given ones, then those that the policy empties.

        Slots that batch `oldest` or a later one used stay; there must be enough of others.
        """

    @abstractmethod
    def exchange(self, batch: Batch) -> None:
        """Bring those rows into the chosen slots, and what was there into their places."""

    @abstractmethod
    def refill(self, batch: Batch) -> None:
        """Set those of `batch.slots` that are 0."""

    @abstractmethod
    def restamp(self, batch: Batch, stamp: int) -> None:
        """Let the slots of a batch count as used by batch `stamp`, or as `entries.HELD`."""

    @abstractmethod
    def unclaim(self, batch: Batch) -> None:
        """Give up the claims on listed rows that are in no slot."""

    def empty(self, table: int, count: int, oldest: int) -> Tensor:
        """Take up to `count` slots out of the queues, those to lose first: [N] int64."""
        return empty_slots(self.state, table, count, oldest)

    def enqueue(self, table: int, slots: Tensor, rows: Tensor) -> None:
        """Put slots [N] int64, which hold new `rows` [N], into the queues."""
        enqueue_slots(self.state, table, slots, rows)


__all__ = ["DeviceOps", "Given"]
