"""How often slots were read: counted on the device, where rows are, and judged on the host, where misses are met."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_turbossd.cache.eviction import Evictable


class Reads:
    """A byte a slot: how many batches read it since its count was last set, up to `most`.

    Slots as tensors are [N] int64 on the device, as arrays [N] int64; those of an array are distinct. The counts of
    slots that hold no row mean nothing.
    """

    def __init__(self, slots: int, most: int, device: torch.device) -> None:
        self._counts = torch.zeros(slots + 1, dtype=torch.uint8, device=device)
        self._most = most

    @property
    def nbytes(self) -> int:
        return self._counts.nbytes

    def add(self, slots: Tensor) -> None:
        """A batch read `slots`, which may repeat."""
        counts = self._counts.gather(0, slots)
        self._counts.scatter_(0, slots, counts.add_(1).clamp_(max=self._most))

    def clear(self, slots: NDArray[np.int64]) -> None:
        """Forget the reads of `slots`."""
        self._counts.index_fill_(0, self._there(slots), 0)

    def less(self, slots: NDArray[np.int64]) -> None:
        """Forget one read of each of `slots`, which have some."""
        at = self._there(slots)
        self._counts.scatter_(0, at, self._counts.gather(0, at).sub_(1))

    def move(self, old: Tensor, new: Tensor) -> None:
        """Let slots `new` have the reads of `old`."""
        self._counts.scatter_(0, new, self._counts.gather(0, old))

    def judge(self, slots: NDArray[np.int64], evictable: Evictable) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which of `slots` are evictable and unread, and which are so and were read: [N] bool each, in one copy."""
        at = self._there(slots)
        free, read = evictable(at), self._counts.gather(0, at) > 0
        unread, were_read = torch.stack((free & ~read, free & read)).cpu().numpy()
        return unread, were_read

    def all(self) -> NDArray[np.uint8]:
        """Reads of every slot: [slots + 1]."""
        counts: NDArray[np.uint8] = self._counts.cpu().numpy().copy()
        return counts

    def _there(self, slots: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(slots).to(self._counts.device)


class HostReads(Reads):
    """The same on the CPU, through an array over the tensor's memory: for some hundred slots in half the time."""

    def __init__(self, slots: int, most: int) -> None:
        super().__init__(slots, most, torch.device("cpu"))
        self._array: NDArray[np.uint8] = self._counts.numpy()

    def add(self, slots: Tensor) -> None:
        at = slots.numpy()
        self._array[at] = np.minimum(self._array[at] + 1, self._most)

    def clear(self, slots: NDArray[np.int64]) -> None:
        self._array[slots] = 0

    def less(self, slots: NDArray[np.int64]) -> None:
        self._array[slots] -= 1

    def judge(self, slots: NDArray[np.int64], evictable: Evictable) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        free: NDArray[np.bool_] = evictable(torch.from_numpy(slots)).numpy()
        read = self._array[slots] > 0
        return free & ~read, free & read


def reads_on(device: torch.device, slots: int, most: int) -> Reads:
    """The reads of slots 0 to `slots` of a device, up to `most`."""
    return HostReads(slots, most) if device.type == "cpu" else Reads(slots, most, device)


def to_host(*tensors: Tensor) -> list[NDArray[np.int64]]:
    """Tensors [N] int64 of one length as arrays, in one copy from the device."""
    if tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    return list(torch.stack(tensors).cpu().numpy())


__all__ = ["HostReads", "Reads", "reads_on", "to_host"]
