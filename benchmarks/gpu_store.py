"""A row store whose rows are a pattern of their ids, so that stores, stock modules and checks agree at no cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchrec_turbossd.errors import UnsupportedError
from torchrec_turbossd.rows import quantise
from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.tables import TableSpec

_WINDOW = 1 << 16
_STEP, _TABLE = 40503, 977
"""Odd, so that neighbouring ids have different rows."""
_FILLED = 1 << 18


class Pattern:
    """Rows of the window of random rows that tables of one width and type share.

    Args:
        tables: of one width, data type and state.
        seed: of the window.
        bound: floating weights are between -bound and bound.
    """

    def __init__(self, tables: Sequence[TableSpec], seed: int, bound: float = 0.05) -> None:
        table = tables[0]
        generator = torch.Generator().manual_seed(seed)
        weights = (torch.rand(_WINDOW, table.dim, generator=generator) * 2 - 1) * bound
        body = quantise(weights, table.data_type)
        self.window = torch.zeros(_WINDOW, table.row_bytes, dtype=torch.uint8)
        self.window[:, : body.shape[1]] = body
        self.weight_bytes = body.shape[1]
        self.places = {each.name: place for place, each in enumerate(tables)}

    def indices(self, name: str, ids: Tensor) -> Tensor:
        """[N] int64: the window's row for each id."""
        return (ids * _STEP + self.places[name] * _TABLE) & (_WINDOW - 1)

    def fill(self, name: str, weights: Tensor) -> None:
        """Set a whole table, `weights` [rows, at least the bytes of the weights] uint8 on any device."""
        window = self.window[:, : self.weight_bytes].to(weights.device)
        for start in range(0, weights.shape[0], _FILLED):
            ids = torch.arange(start, min(start + _FILLED, weights.shape[0]), device=weights.device)
            weights[start : start + ids.numel(), : self.weight_bytes] = window[self.indices(name, ids)]


class PatternStore(RowStore):
    """Rows of a pattern, with those written on top: in memory, and the quicker the fewer are written.

    Args:
        tables: as in the pattern.
    """

    def __init__(self, tables: Sequence[TableSpec], pattern: Pattern) -> None:
        super().__init__({table.name: table.row_bytes for table in tables})
        self._pattern = pattern
        self._rows = {table.name: table.rows for table in tables}
        self._window = pattern.window.numpy()
        self._written: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.rows_read = 0

    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.rows_read += ids.numel()
        rows = np.take(self._window, self._pattern.indices(table, ids).numpy(), axis=0, mode="clip")
        if table in self._written:
            held, known = self._written[table]
            at = np.flatnonzero(known[ids.numpy()])
            rows[at] = held[ids.numpy()[at]]
        return torch.from_numpy(rows), torch.ones(ids.numel(), dtype=torch.bool)

    def write(self, batch: Mapping[str, Rows]) -> None:
        for table, (ids, rows) in batch.items():
            if table not in self._written:
                # Untouched memory costs nothing until it is written.
                count = self._rows[table]
                self._written[table] = np.zeros((count, self.row_bytes[table]), np.uint8), np.zeros(count, np.bool_)
            held, known = self._written[table]
            held[ids.numpy()], known[ids.numpy()] = rows.numpy(), True

    def commit(self, batch: Mapping[str, Rows]) -> Mapping[str, Rows]:
        return batch

    def publish(self, committed: Mapping[str, Rows]) -> None:
        self.write(committed)

    def scan(self, table: str, start: int = 0, window: int = 65536) -> Iterator[Rows]:
        for first in range(start, self._rows[table], window):
            ids = torch.arange(first, min(first + window, self._rows[table]))
            yield ids, self.read(table, ids)[0]

    def flush(self) -> None:
        """There is nothing to do."""

    def checkpoint(self, path: Path) -> None:
        raise UnsupportedError(f"rows of a benchmark are in memory only, got {path}; checkpoint a RocksRowStore")

    def close(self) -> None:
        self._written = {}


__all__ = ["Pattern", "PatternStore"]
