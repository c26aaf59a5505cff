"""Rows in host memory, which a GPU reads and writes in place: the tier between slots and the row store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_turbossd.cache import entries
from torchrec_turbossd.cache.host_memory import host_rows

LEAST_DRAM_ROWS = 4096
"""Places that each table has in any case, or as many as it has rows: what comes from the store passes through them."""

_ALIGNMENT = 16
_LEAST_WINDOW = 1024


def dram_row_bytes(row_bytes: int) -> int:
    """Bytes of host memory that one row of the tier takes: the row and a header that says whose it is, in whole 16.

    Args:
        row_bytes: of the row as the store has it, without the padding of slots.
    """
    return -(-(_header_at(row_bytes) + entries.HEADER_BYTES) // _ALIGNMENT) * _ALIGNMENT


def _header_at(row_bytes: int) -> int:
    return -(-row_bytes // entries.HEADER_BYTES) * entries.HEADER_BYTES


class DramTier:
    """Places of each table, numbered from 0. Who reads or writes it here has made sure that no kernel does.

    Args:
        row_bytes: of each table.
        places: of each table.
        keeps: for each table, `entries.KEEP_CHANGED`, `KEEP_ALL` or `KEEP_COPIES`; the last needs a place for each row.
    """

    def __init__(
        self, row_bytes: Sequence[int], places: Sequence[int], keeps: Sequence[int], device: torch.device
    ) -> None:
        self.row_bytes, self.places, self.keeps = list(row_bytes), list(places), list(keeps)
        self.header_at = [_header_at(size) for size in row_bytes]
        self.tables: list[Tensor] = []
        self._headers: list[NDArray[np.int64]] = []
        for size, count, at in zip(row_bytes, places, self.header_at, strict=True):
            self.tables.append(host_rows(count, dram_row_bytes(size), device))
            self._headers.append(self.tables[-1].numpy()[:, at : at + entries.HEADER_BYTES].view(np.int64)[:, 0])
            # Only now is the memory taken.
            self._headers[-1][:] = entries.FREE
        self._hands = [0] * len(places)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(table.nbytes for table in self.tables)

    def copies(self, table: int) -> bool:
        """Rows of a table stay where they are when they come into slots."""
        return self.keeps[table] == entries.KEEP_COPIES

    def read(self, table: int, places: Tensor) -> Tensor:
        """Rows at `places` [N] int64: [N, row_bytes] uint8."""
        return self.tables[table][places, : self.row_bytes[table]]

    def write(self, table: int, places: Tensor, rows: Tensor) -> None:
        """Other bytes, `rows` [N, row_bytes] uint8, for the rows at `places` [N] int64."""
        self.tables[table][places, : self.row_bytes[table]] = rows

    def admit(self, table: int, places: Tensor, ids: Tensor, rows: Tensor) -> None:
        """Rows of `ids` [N] int64, as the store has them, are at `places` [N] now."""
        self.write(table, places, rows)
        self._headers[table][places.numpy()] = ids.numpy() | entries.HEADER_FRESH

    def release(self, table: int, places: Tensor) -> None:
        """No row is at `places` [N] any more."""
        self._headers[table][places.numpy()] = entries.FREE

    def mark(self, table: int, places: Tensor, *, dirty: bool) -> None:
        """The rows at `places` [N] differ from the store's, or do not."""
        header, at = self._headers[table], places.numpy()
        if dirty:
            header[at] |= entries.HEADER_DIRTY
        else:
            header[at] &= ~entries.HEADER_DIRTY

    def dirty(self, table: int) -> tuple[Tensor, Tensor]:
        """(ids, places) of the rows that differ from the store's."""
        header = self._headers[table]
        return self._where(table, (header != entries.FREE) & ((header & entries.HEADER_DIRTY) != 0))

    def resident(self, table: int) -> tuple[Tensor, Tensor]:
        """(ids, places) of all rows here."""
        return self._where(table, self._headers[table] != entries.FREE)

    def _where(self, table: int, wanted: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        places = np.flatnonzero(wanted)
        ids = self._headers[table][places] & entries.HEADER_ID
        return torch.from_numpy(ids), torch.from_numpy(places)

    def make_room(self, table: int, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places for the first of `ids` [N] int64, which are not here: in the order of a clock's hand.

        Returns (places [M], ids [K], places [K]): places to use, and the rows that are at some of them. These must be
        taken out before anything is put there.
        """
        if self.copies(table):
            return ids, ids[:0], ids[:0]
        header, size = self._headers[table], self.places[table]
        count = min(ids.numel(), size)
        found: list[NDArray[np.int64]] = []
        # The second round finds what the first has unmarked.
        left, passed = count, 0
        while left > 0 and passed < 2 * size:
            window = min(max(2 * left, _LEAST_WINDOW), size, 2 * size - passed)
            at = (self._hands[table] + np.arange(window)) % size
            fresh = (header[at] != entries.FREE) & ((header[at] & entries.HEADER_FRESH) != 0)
            again = np.isin(at, np.concatenate(found)) if passed + window > size and found else False
            usable = np.flatnonzero(~fresh & ~np.asarray(again))[:left]
            reached = int(usable[-1]) + 1 if usable.size == left else window
            unmarked = at[:reached][fresh[:reached]]
            header[unmarked] &= ~entries.HEADER_FRESH
            found.append(at[usable])
            left -= usable.size
            passed += reached
            self._hands[table] = int((self._hands[table] + reached) % size)
        places = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
        held = places[header[places] != entries.FREE]
        return torch.from_numpy(places), torch.from_numpy(header[held] & entries.HEADER_ID), torch.from_numpy(held)

    def is_dirty(self, table: int, places: Tensor) -> Tensor:
        """Which of the rows at `places` [N] differ from the store's: [N] bool."""
        return torch.from_numpy((self._headers[table][places.numpy()] & entries.HEADER_DIRTY) != 0)

    def clear(self) -> None:
        """No row is here any more."""
        for header in self._headers:
            header[:] = entries.FREE


__all__ = ["LEAST_DRAM_ROWS", "DramTier", "dram_row_bytes"]
