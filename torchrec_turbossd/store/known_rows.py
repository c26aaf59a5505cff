"""A row store that is not asked for rows that were never written: a bit for each row says which."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.store.row_bits import RowBits


class KnownRowsStore(RowStore):
    """`inner`, with reads of rows that it cannot hold answered from memory.

    A training run begins with rows that nobody has written, and meets new ones ever after; finding out from a log
    structured store that a row is not there costs as much as reading one. Memory: an eighth of a byte for each row, of
    which the system gives what is touched.

    Args:
        inner: nobody else may write to it. `close` closes it.
        rows: of each table; ids beyond are always asked for.
        empty: whether `inner` holds no rows yet; else any row may be there.
    """

    def __init__(self, inner: RowStore, rows: Mapping[str, int], *, empty: bool) -> None:
        super().__init__(inner.row_bytes)
        self.inner = inner
        self._setting = threading.Lock()
        self._written = {table: RowBits(count) for table, count in rows.items()} if empty else {}

    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        if table not in self._written:
            return self.inner.read(table, ids)
        self.check_ids(table, ids)
        may_hold = self._written[table].may_hold(ids)
        if may_hold is not None and may_hold.all():
            return self.inner.read(table, ids)
        rows = torch.zeros(ids.numel(), self.row_bytes[table], dtype=torch.uint8)
        found = torch.zeros(ids.numel(), dtype=torch.bool)
        asked = torch.from_numpy(may_hold) if may_hold is not None else found.clone()
        # Asked even for nothing: a closed store says so.
        rows[asked], found[asked] = self.inner.read(table, ids[asked])
        return rows, found

    def write(self, batch: Mapping[str, Rows]) -> None:
        self.check_batch(batch)
        for table, (ids, _) in batch.items():
            if table in self._written:
                # Before the rows are there: a bit that is set for nothing costs one question.
                with self._setting:
                    self._written[table].set(ids)
        self.inner.write(batch)

    def scan(self, table: str, start: int = 0, window: int = 65536) -> Iterator[Rows]:
        return self.inner.scan(table, start, window)

    def flush(self) -> None:
        self.inner.flush()

    def checkpoint(self, path: Path) -> None:
        self.inner.checkpoint(path)

    def close(self) -> None:
        self.inner.close()


__all__ = ["KnownRowsStore"]
