"""One bit for each row of a table: may the row have been updated since the base was written?

The bits are in memory; `save` writes those that changed. A file that loses bits would bring old rows back, so each of
its pages has a checksum, and a damaged page reads as all ones: a bit that is set for nothing costs one look-up.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from torchrec_turbossd.errors import CorruptError
from torchrec_turbossd.store.directory import sync_directory
from torchrec_turbossd.store.faults import os_errors
from torchrec_turbossd.store.linking import written_ranges
from torchrec_turbossd.store.row_bits import RowBits

PAGE_BYTES = 4096
_BODY = PAGE_BYTES - 4


class UpdateBits(RowBits):
    """The bits of one table, kept in a file.

    Args:
        path: the file; without one no bit is set.
        rows: rows of the table. Ids beyond have no bit: they count as updated.

    Raises:
        CorruptError: the file has the wrong size.
        StoreError: it cannot be read.
    """

    def __init__(self, path: Path, rows: int) -> None:
        pages = -(-rows // (8 * _BODY))
        super().__init__(rows, pages * _BODY)
        self.path = path
        self._used, self._dirty = np.zeros((2, pages), dtype=np.bool_)
        self._saving = threading.Lock()
        if path.exists():
            with os_errors(path):
                self._load()

    def _load(self) -> None:
        want = self._dirty.size * PAGE_BYTES
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # Of no size it was made, and no more.
            if size not in (0, want):
                raise CorruptError(f"{self.path} has {size} bytes, {want} were expected; restore it from a snapshot")
            for page in _written_pages(file.fileno(), self._dirty.size):
                data = os.pread(file.fileno(), PAGE_BYTES, page * PAGE_BYTES)
                if not any(data):
                    continue
                body = np.frombuffer(data[:_BODY], dtype=np.uint8)
                is_whole = zlib.crc32(data[:_BODY]).to_bytes(4, "little") == data[_BODY:]
                self._bits[page * _BODY : (page + 1) * _BODY] = body if is_whole else 255
                self._used[page] = self._any = True

    def set(self, ids: Tensor) -> np.ndarray:
        """Set the bits of `ids` [N] int64; returns the distinct bytes that hold them."""
        places = super().set(ids)
        self._used[places // _BODY] = True
        self._dirty[places // _BODY] = True
        return places

    def save(self) -> None:
        """Make every bit that is set durable. Raises `StoreError`, after which a later call tries again."""
        with self._saving:
            pages = np.flatnonzero(self._dirty)
            if not pages.size:
                return
            # Before they are read, so that a bit set meanwhile is written now or next time.
            self._dirty[pages] = False
            try:
                with os_errors(self.path):
                    self._write(self.path, pages)
            except BaseException:
                self._dirty[pages] = True
                raise

    def save_as(self, path: Path) -> None:
        """Write all bits to the new file `path`, durably. Raises `OSError`."""
        self._write(path, np.flatnonzero(self._used))

    def _write(self, path: Path, pages: np.ndarray) -> None:
        path.parent.mkdir(exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(handle, self._dirty.size * PAGE_BYTES)
            for page in pages.tolist():
                body = self._bits[page * _BODY : (page + 1) * _BODY].tobytes()
                _write_at(handle, body + zlib.crc32(body).to_bytes(4, "little"), page * PAGE_BYTES)
            os.fsync(handle)
        finally:
            os.close(handle)
        for folder in (path.parent, path.parent.parent):
            sync_directory(folder)


def _write_at(handle: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        done = os.pwrite(handle, left, offset)
        left, offset = left[done:], offset + done


def _written_pages(handle: int, pages: int) -> Iterator[int]:
    """Pages that are not holes of a file."""
    for start, end in written_ranges(handle):
        yield from range(start // PAGE_BYTES, min(pages, -(-end // PAGE_BYTES)))


__all__ = ["PAGE_BYTES", "UpdateBits"]
