"""A row store in a plain dict: for tests, and for tables that fit in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchrec_turbossd.errors import ForeignDirectoryError
from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.store.directory import check_sizes, staged
from torchrec_turbossd.store.faults import os_errors
from torchrec_turbossd.store.gate import Gate

_FILE = "memory_rows.pt"


class MemoryRowStore(RowStore):
    """Rows in memory, one Python object each; `flush` has nothing to do.

    Args:
        row_bytes: bytes of one row by table.
    """

    def __init__(self, row_bytes: Mapping[str, int]) -> None:
        check_sizes(row_bytes)
        super().__init__(row_bytes)
        self._gate = Gate("the row store in memory")
        self._lock = threading.Lock()
        self._tables: dict[str, dict[int, bytes]] = {table: {} for table in row_bytes}

    @classmethod
    def open(cls, path: Path) -> MemoryRowStore:
        """The store that `checkpoint(path)` wrote; raises `ForeignDirectoryError` for anything else."""
        if not (path / _FILE).is_file():
            raise ForeignDirectoryError(f"{path} is not a checkpoint of rows in memory: it has no {_FILE}")
        with os_errors(path):
            saved = torch.load(path / _FILE, weights_only=True)
        store = cls(saved["row_bytes"])
        store.write(saved["rows"])
        return store

    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        with self._gate.call():
            self.check_ids(table, ids)
            with self._lock:
                values = list(map(self._tables[table].get, ids.tolist()))
            rows = torch.zeros(len(values), self.row_bytes[table], dtype=torch.uint8)
            for row, value in zip(rows, values, strict=True):
                if value is not None:
                    row.copy_(torch.frombuffer(bytearray(value), dtype=torch.uint8))
            return rows, torch.tensor([v is not None for v in values], dtype=torch.bool)

    def write(self, batch: Mapping[str, Rows]) -> None:
        with self._gate.call():
            self.check_batch(batch)
            new = {
                table: dict(zip(ids.tolist(), map(bytes, rows.numpy()), strict=True))
                for table, (ids, rows) in batch.items()
            }
            with self._lock:
                for table, values in new.items():
                    self._tables[table].update(values)

    def scan(self, table: str, start: int = 0, window: int = 65536) -> Iterator[Rows]:
        with self._gate.call():
            self.check_scan(table, start, window)
            with self._lock:
                found = sorted(item for item in self._tables[table].items() if item[0] >= start)
        return self._windows(table, found, window)

    def _windows(self, table: str, found: list[tuple[int, bytes]], window: int) -> Iterator[Rows]:
        for first in range(0, len(found), window):
            with self._gate.call():
                rows = self._as_rows(table, found[first : first + window])
            yield rows

    def _as_rows(self, table: str, items: list[tuple[int, bytes]]) -> Rows:
        ids = torch.tensor([key for key, _ in items], dtype=torch.int64)
        data = bytearray().join(value for _, value in items)
        rows = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return ids, rows.view(len(items), self.row_bytes[table])

    def flush(self) -> None:
        with self._gate.call():
            return

    def checkpoint(self, path: Path) -> None:
        with self._gate.call():
            with self._lock:
                rows = {table: self._as_rows(table, sorted(found.items())) for table, found in self._tables.items()}
            with staged(path) as temp:
                temp.mkdir()
                torch.save({"row_bytes": self.row_bytes, "rows": rows}, temp / _FILE)

    def close(self) -> None:
        with self._gate.closing() as first:
            if first:
                self._tables = {}


__all__ = ["MemoryRowStore"]
