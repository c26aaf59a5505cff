"""A file that never changes, read at random through a memory map and in order by reading."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchrec_turbossd.errors import CorruptError
from torchrec_turbossd.store.faults import os_errors

PAGE_BYTES = 4096


class MappedFile:
    """A file that is read: at random through a memory map, and in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._handle).st_size

    def check_size(self, want: int) -> None:
        """Raise `CorruptError` unless the file has `want` bytes."""
        if self.size != want:
            raise CorruptError(
                f"{self.path} has {self.size} bytes, its header says {want}; restore the store from a snapshot"
            )

    def view(self, dtype: torch.dtype, offset: int, shape: tuple[int, ...]) -> Tensor:
        """The file from byte `offset` as a tensor, which must not be written; it keeps the map alive."""
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        with os_errors(self.path):
            mapped = mmap.mmap(self._handle, 0, mmap.MAP_SHARED, mmap.PROT_READ)
            mapped.madvise(mmap.MADV_RANDOM)
        return torch.from_numpy(np.asarray(_Interface(mapped, dtype, offset, shape)))

    def read(self, dtype: torch.dtype, offset: int, count: int) -> Tensor:
        """`count` items from byte `offset`, by reading: the system reads ahead."""
        data = torch.empty(count, dtype=dtype)
        if count == 0:
            return data
        left = data.numpy().data.cast("B")
        with os_errors(self.path):
            while left:
                done = os.preadv(self._handle, [left], offset)
                if done == 0:
                    raise CorruptError(f"{self.path} ends at byte {offset}; restore the store from a snapshot")
                left, offset = left[done:], offset + done
        return data

    def ask_for(self, pages: np.ndarray) -> None:
        """Have `pages` (numbers, any order, with repeats) read from the disk, without waiting."""
        distinct = np.unique(pages)
        begins = np.flatnonzero(np.diff(distinct, prepend=-2) > 1)
        counts = np.diff(begins, append=distinct.size)
        handle, advise, will_need = self._handle, os.posix_fadvise, os.POSIX_FADV_WILLNEED
        for page, count in zip((distinct[begins] * PAGE_BYTES).tolist(), (counts * PAGE_BYTES).tolist(), strict=True):
            advise(handle, page, count, will_need)

    def holds(self, offsets: Tensor) -> bool:
        """Whether the bytes at all of `offsets` are in memory; False where the file system does not tell."""
        byte = bytearray(1)
        try:
            for offset in offsets.tolist():
                os.preadv(self._handle, [byte], offset, os.RWF_NOWAIT)
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class _Interface:
    """Shows NumPy a memory map that may only be read as if it could be written, which torch asks of an array.

    Mapped to be written it would count against the memory that the system lets a process ask for.
    """

    def __init__(self, mapped: mmap.mmap, dtype: torch.dtype, offset: int, shape: tuple[int, ...]) -> None:
        self._mapped = mapped
        start = np.frombuffer(mapped, dtype=np.uint8).__array_interface__["data"][0]
        kind = torch.empty(0, dtype=dtype).numpy().dtype.str
        self.__array_interface__ = {"version": 3, "data": (start + offset, False), "shape": shape, "typestr": kind}


__all__ = ["PAGE_BYTES", "MappedFile"]
