"""The row store's contract: rows of bytes by (table, global row id), whatever holds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchrec_turbossd.errors import InputError, UnknownTableError

Rows = tuple[Tensor, Tensor]
"""(ids [N] int64, rows [N, row_bytes] uint8), both on the CPU; ids are global row ids."""


class RowStore(ABC):
    """Rows by (table key, global row id). Safe to call from several threads.

    Every implementation gives: `read` sees every `write` that returned before it started; a `write` is atomic, all
    of its rows or none, and the last of duplicate ids wins; a call that raises changed nothing. A `read` that overlaps
    a `write` of another thread may see it in part: who needs more orders the two.
    """

    def __init__(self, row_bytes: Mapping[str, int]) -> None:
        self.row_bytes: dict[str, int] = dict(row_bytes)

    @abstractmethod
    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of `ids` [N]: ([N, row_bytes] uint8, found [N] bool); rows not found are zero bytes."""

    @abstractmethod
    def write(self, batch: Mapping[str, Rows]) -> None:
        """Write rows of any number of tables at once, atomically."""

    @abstractmethod
    def scan(self, table: str, start: int = 0, window: int = 65536) -> Iterator[Rows]:
        """Written rows with id >= start in ascending order, at most `window` rows at a time.

        All of one point in time, that of this call. Arguments are checked at once, not at the first window.
        """

    @abstractmethod
    def flush(self) -> None:
        """Make everything written durable; returns when it is."""

    @abstractmethod
    def checkpoint(self, path: Path) -> None:
        """Write a consistent copy that later writes do not change to `path`, which must not exist yet."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; further calls raise `ClosedError`. Closing twice is allowed."""

    def check_ids(self, table: str, ids: Tensor) -> None:
        """Raise unless `ids` can be looked up in `table`."""
        if table not in self.row_bytes:
            known = ", ".join(map(repr, self.row_bytes))
            raise UnknownTableError(f"no table {table!r} in this store; the tables are {known}")
        if ids.dim() != 1 or ids.dtype != torch.int64 or ids.device.type != "cpu":
            raise InputError(
                f"store ids must be 1-D int64 on the CPU, got {ids.dim()}-D {ids.dtype} on {ids.device.type}"
            )
        if ids.numel() and int(ids.min()) < 0:
            raise InputError(f"store ids must not be negative, got {int(ids.min())} for table {table!r}")

    def check_scan(self, table: str, start: int, window: int) -> None:
        """Raise unless `table` can be scanned from `start` by `window` rows."""
        self.check_ids(table, torch.tensor([start], dtype=torch.int64))
        if window < 1:
            raise InputError(f"a scan's window must be at least one row, got {window}")

    def check_batch(self, batch: Mapping[str, Rows]) -> None:
        """Raise unless every part of `batch` can be written."""
        for table, (ids, rows) in batch.items():
            self.check_ids(table, ids)
            want = (ids.numel(), self.row_bytes[table])
            if tuple(rows.shape) != want or rows.dtype != torch.uint8 or rows.device.type != "cpu":
                raise InputError(
                    f"store rows of {table!r} must be {want} uint8 on the CPU, got {tuple(rows.shape)} {rows.dtype} "
                    f"on {rows.device.type}"
                )


__all__ = ["RowStore", "Rows"]
