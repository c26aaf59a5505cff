"""An immutable base and the rows updated since, in RocksDB, as one row store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchrec_turbossd.errors import CorruptError
from torchrec_turbossd.store import layered_form, linking
from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.store.directory import staged, sync_directory
from torchrec_turbossd.store.flat import FlatTable, ids_file, rows_file
from torchrec_turbossd.store.layered_form import LayeredTable
from torchrec_turbossd.store.rocks import RocksRowStore
from torchrec_turbossd.store.rocks_options import RocksOptions
from torchrec_turbossd.store.update_bits import UpdateBits


@dataclass
class _Table:
    base: FlatTable | None
    bits: UpdateBits


class UpdatedBase(RowStore):
    """Rows of a layered store that are on disk. One thread at a time writes, and not during a `checkpoint`.

    A `write` is lost when the process ends before `flush`.

    Args:
        path: the store's directory.
        tables: what its format file says.
        read_threads, options: RocksDB's.
    """

    def __init__(
        self, path: Path, tables: Mapping[str, LayeredTable], *, read_threads: int, options: RocksOptions | None
    ) -> None:
        super().__init__({name: table.row_bytes for name, table in tables.items()})
        self.path, self._described = path, dict(tables)
        self._tables: dict[str, _Table] = {}
        self._closed = False
        updates = path / layered_form.UPDATES
        if not updates.is_dir():
            raise CorruptError(f"{updates} is missing; restore the store from a snapshot")
        with ExitStack() as stack:
            # First, for its lock.
            self._updates = RocksRowStore(
                updates, self.row_bytes, wal=False, read_threads=read_threads, create=False, options=options
            )
            stack.callback(self._updates.close)
            stack.callback(self._close_bases)
            for name, table in tables.items():
                self._tables[name] = self._open(name, table)
            stack.pop_all()

    def _open(self, name: str, table: LayeredTable) -> _Table:
        file = table.bits(self.path)
        is_new = not file.exists()
        bits = UpdateBits(file, table.rows)
        base = FlatTable(table.base(self.path), table.row_bytes) if table.has_base else None
        if is_new:
            # The process ended before they were saved for the first time.
            for ids, _ in self._updates.scan(name):
                bits.set(ids)
        return _Table(base, bits)

    def _close_bases(self) -> None:
        for table in self._tables.values():
            if table.base is not None:
                table.base.close()

    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        updated = self._tables[table].bits.may_hold(ids)
        if updated is None:
            return self._read_base(table, ids)
        places = np.flatnonzero(updated)
        new_rows, is_there = (part.numpy() for part in self._updates.read(table, ids[torch.from_numpy(places)]))
        if is_there.all() and places.size == ids.numel():
            return torch.from_numpy(new_rows), torch.from_numpy(is_there)
        # By NumPy, which stays in this thread: many read at once.
        places, new_rows = places[is_there], new_rows[is_there]
        found = np.zeros(ids.numel(), dtype=np.bool_)
        found[places] = True
        rest = np.flatnonzero(~found)
        base_rows, base_found = self._read_base(table, ids[torch.from_numpy(rest)])
        rows = np.empty((ids.numel(), self.row_bytes[table]), dtype=np.uint8)
        rows[places], rows[rest], found[rest] = new_rows, base_rows.numpy(), base_found.numpy()
        return torch.from_numpy(rows), torch.from_numpy(found)

    def _read_base(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        base = self._tables[table].base
        if base is not None:
            return base.read(ids)
        rows = torch.zeros(ids.numel(), self.row_bytes[table], dtype=torch.uint8)
        return rows, torch.zeros(ids.numel(), dtype=torch.bool)

    def write(self, batch: Mapping[str, Rows]) -> None:
        for table, (ids, _) in batch.items():
            # First, so that no read misses a row that is there.
            self._tables[table].bits.set(ids)
        self._updates.write(batch)

    def scan(self, table: str, start: int = 0, window: int = 65536) -> Iterator[Rows]:
        updates = self._updates.scan(table, start, window)
        base = self._tables[table].base
        return updates if base is None else _merged(base.scan(start, window), updates, window)

    def flush(self) -> None:
        self._updates.flush()
        for table in self._tables.values():
            table.bits.save()

    def checkpoint(self, path: Path) -> None:
        """A copy whose base is hard links where the file system allows; see `RowStore.checkpoint`."""
        with staged(Path(path).absolute()) as temp:
            temp.mkdir()
            self._updates.checkpoint(temp / layered_form.UPDATES)
            (temp / layered_form.BITS).mkdir()
            files = []
            for name, table in self._described.items():
                self._tables[name].bits.save_as(table.bits(temp))
                files += [f(table.base(self.path)) for f in (rows_file, ids_file) if table.has_base]
            (temp / layered_form.BASE).mkdir()
            linking.link_or_copy([f for f in files if f.exists()], temp / layered_form.BASE)
            sync_directory(temp / layered_form.BASE)
            layered_form.write_tables(temp, self._described)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            self._updates.close()
            self._close_bases()


def _merged(base: Iterator[Rows], updates: Iterator[Rows], window: int) -> Iterator[Rows]:
    """Rows of both in ascending order, `window` at a time, in which those of `updates` win."""
    old, new = _Stream(base), _Stream(updates)
    while True:
        ends = [s.last for s in (old, new) if s.last is not None]
        if not ends:
            return
        ids, rows = _joined(old.take(min(ends)), new.take(min(ends)))
        yield from zip(ids.split(window), rows.split(window), strict=True)


def _joined(old: Rows | None, new: Rows | None) -> Rows:
    """Rows of both, of which not both are None, ascending; `new` wins."""
    if old is None or new is None:
        return old or new or (torch.empty(0, dtype=torch.int64), torch.empty(0, 0, dtype=torch.uint8))
    kept = ~torch.isin(old[0], new[0])
    ids, order = torch.cat([old[0][kept], new[0]]).sort()
    return ids, torch.cat([old[1][kept], new[1]])[order]


class _Stream:
    """Windows of rows in ascending order, of which one is in memory."""

    def __init__(self, windows: Iterator[Rows]) -> None:
        self._windows = windows
        self._held: Rows | None = next(windows, None)

    @property
    def last(self) -> int | None:
        """The last id in memory; None at the end."""
        return None if self._held is None else int(self._held[0][-1])

    def take(self, end: int) -> Rows | None:
        """What is in memory up to id `end`, if anything; reads on where nothing is left."""
        if self._held is None:
            return None
        ids, rows = self._held
        count = int(torch.searchsorted(ids, end, right=True))
        if count == 0:
            return None
        self._held = (ids[count:], rows[count:]) if count < ids.numel() else next(self._windows, None)
        return ids[:count], rows[:count]


__all__ = ["UpdatedBase"]
