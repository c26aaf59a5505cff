"""A scan over one column family of RocksDB: windows of rows, of one point in time, that notice damage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from torchrec_turbossd.errors import CorruptError, StoreError
from torchrec_turbossd.store.contract import Rows

KEY_TYPE = np.dtype(">i8")
"""Keys sort as their ids do."""

SLICE = 4096
"""Rows that go to or come from RocksDB at once: other threads run in between."""


def as_rows(values: Sequence[bytes], width: int) -> np.ndarray:
    """Values to [N, width] uint8, read-only; raises `CorruptError` unless each has `width` bytes."""
    data = b"".join(values)
    if len(data) != len(values) * width or not all(map(width.__eq__, map(len, values))):
        raise CorruptError(
            f"{len(values)} rows of {width} bytes were stored in {len(data)} bytes, or unevenly; restore the store "
            f"from a snapshot"
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(len(values), width)


class ScanCursor:
    """Where a scan is.

    Args:
        family: rocksdict's view of a column family.
        width: bytes of one row.
        start: first id.
        options: rocksdict's, of the iterator.
    """

    def __init__(self, family: Any, width: int, start: int, options: Any) -> None:
        self._family, self._options = family, options
        self._items: Any = family.items(from_key=start.to_bytes(8, "big"), read_opt=options)
        self._width = width
        self._following = start

    def release(self) -> None:
        """Let go of the database; `next` raises from now on."""
        self._family = self._items = None

    def next(self, window: int) -> Rows:
        """The next rows, `window` of them unless the scan ends."""
        if self._items is None:
            raise StoreError("the store was opened anew after a failed write; scan again")
        pairs: list[tuple[bytes, bytes]] = []
        while len(pairs) < window:
            some = list(islice(self._items, min(SLICE, window - len(pairs))))
            if not some:
                break
            pairs += some
        keys, values = zip(*pairs, strict=True) if pairs else ((), ())
        ids = np.frombuffer(b"".join(keys), dtype=KEY_TYPE).astype(np.int64)
        if pairs:
            self._following = int(ids[-1]) + 1
        if len(pairs) < window:
            self._raise_if_damaged()
        return torch.from_numpy(ids), torch.from_numpy(as_rows(values, self._width).copy())

    def _raise_if_damaged(self) -> None:
        # rocksdict's items end without a word at a damaged block; only an iterator at that place tells.
        probe = self._family.iter(self._options)
        probe.seek(self._following.to_bytes(8, "big"))
        probe.status()


__all__ = ["KEY_TYPE", "SLICE", "ScanCursor", "as_rows"]
