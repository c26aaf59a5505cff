"""A row store in RocksDB: one database, one column family for each table, global row ids as big-endian keys.

Only here and in `rocks_settings` is rocksdict imported, which keeps Python's global lock while it writes: so rows go in
by slices, and a write waits outside RocksDB while RocksDB has no room for it.
"""

from __future__ import annotations

import shutil
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from operator import is_not
from pathlib import Path
from typing import Any

import numpy as np
import rocksdict
import torch
from torch import Tensor

from torchrec_turbossd.errors import (
    ConfigError,
    CorruptError,
    ForeignDirectoryError,
    StoreError,
)
from torchrec_turbossd.store import directory
from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.store.faults import full_error, os_errors, read_only_error, rocks_errors
from torchrec_turbossd.store.gate import Gate
from torchrec_turbossd.store.rocks_options import RocksOptions
from torchrec_turbossd.store.rocks_scan import KEY_TYPE, SLICE, ScanCursor, as_rows
from torchrec_turbossd.store.rocks_settings import scan_options, table_settings

_OWN_FILES = (
    *("CURRENT", "IDENTITY", "LOCK", "LOG*", "MANIFEST-*", "OPTIONS-*", "*.sst", "*.log", "*.dbtmp"),
    *("rocksdict-config.json", directory.FORMAT_FILE, f".{directory.FORMAT_FILE}.*"),
)
_LEAST_PART = 256
_STALL_S, _STALL_POLL_S = 10.0, 0.001
_HEAL_BYTES = 4 << 20


@dataclass
class _Family:
    # A handle alone keeps the database, and with it the lock, open: closing clears both fields.
    rows: Any
    handle: Any
    width: int


def _keys(ids: np.ndarray) -> list[bytes]:
    return ids.astype(KEY_TYPE).view("V8").tolist()


class RocksRowStore(RowStore):
    """Rows in RocksDB.

    With the write-ahead log (`wal`) a `write` that returned survives the end of the process; `flush` makes it survive
    the end of the machine. Without it a crash loses what was not flushed, and may keep part of a write: that is for
    stores that can be made again. Closing keeps everything either way.

    After a write failed for want of space, reads go on. Writes go on once there is space: without the log when
    RocksDB notices (about 5 s), with it by opening the database anew at the next write.

    Args:
        path: a directory of its own; made with its parents when `create`.
        row_bytes: bytes of one row by table. Tables new to the store are added when `create`; tables of the store
            that are not named here are kept, untouched.
        wal: keep the write-ahead log.
        read_threads: threads that share the reads of all callers.
        create: make the store, or tables that it lacks.
        read_only: refuse writes, take no lock. Even so the directory must be writable, because rocksdict writes its
            settings there.
        options: memory, disk and threads; default `RocksOptions()`.

    Raises:
        ConfigError: an argument that cannot be honoured.
        ForeignDirectoryError, FormatVersionError, StoreLockedError, ReadOnlyStoreError, StoreFullError, CorruptError:
            what the directory is.
        StoreError: no store there, or one of other tables or row sizes.
    """

    def __init__(
        self,
        path: Path | str,
        row_bytes: Mapping[str, int],
        *,
        wal: bool = True,
        read_threads: int = 2,
        create: bool = True,
        read_only: bool = False,
        options: RocksOptions | None = None,
    ) -> None:
        directory.check_sizes(row_bytes)
        if read_threads < 1:
            raise ConfigError(f"read_threads must be at least 1, got {read_threads}")
        super().__init__(row_bytes)
        self.path = Path(path).absolute()
        self.wal, self.read_only = wal, read_only
        self._options = options or RocksOptions()
        self._gate = Gate(f"the row store at {self.path}")
        self._commit = threading.Lock()
        self._threads = read_threads
        self._pool: ThreadPoolExecutor | None = None
        self._cursors: weakref.WeakSet[ScanCursor] = weakref.WeakSet()
        self._db: Any = None
        self._families: dict[str, _Family] = {}
        self._suspect: StoreError | None = None
        self._write_options = rocksdict.WriteOptions()
        # The stub says method; it is an attribute.
        self._write_options.disable_wal = not wal  # type: ignore[method-assign,assignment]
        stored = directory.prepare(self.path, self.row_bytes, create=create, read_only=read_only)
        self._open()
        self._add_tables(stored)
        if read_threads > 1:
            self._pool = ThreadPoolExecutor(read_threads, thread_name_prefix="turbossd-read")

    def _open(self) -> None:
        settings = table_settings(self._options, self.row_bytes)
        access = rocksdict.AccessType.read_only(False) if self.read_only else rocksdict.AccessType.read_write()
        with rocks_errors(self.path):
            there = _families_in(self.path)
            if self.read_only and not there:
                raise StoreError(f"the row store at {self.path} was never finished; open it for writing first")
            names = dict.fromkeys([*there, *self.row_bytes])
            families = {name: settings.get(name, settings[None]) for name in names}
            self._db = rocksdict.Rdict(str(self.path), settings[None], families, access)
            for table, width in self.row_bytes.items():
                rows = self._db.get_column_family(table)
                self._families[table] = _Family(rows, self._db.get_column_family_handle(table), width)

    def _add_tables(self, stored: Mapping[str, int]) -> None:
        # After opening, because only who holds the lock may change the format file.
        if set(self.row_bytes) <= set(stored):
            return
        try:
            with os_errors(self.path):
                directory.write_format(self.path, {**stored, **self.row_bytes}, replace=True)
        except StoreError:
            self._release()
            raise

    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        with self._gate.call():
            self.check_ids(table, ids)
            family = self._family(table)
            wanted = ids.numpy()
            if bool((wanted[1:] > wanted[:-1]).all()):
                rows, found = self._read_sorted(family, wanted)
            else:
                distinct, inverse = np.unique(wanted, return_inverse=True)
                rows, found = (part[inverse] for part in self._read_sorted(family, distinct))
            return torch.from_numpy(rows), torch.from_numpy(found)

    def _family(self, table: str) -> _Family:
        if self._db is None:
            raise StoreError(f"the row store at {self.path} could not be opened again; write to it to try once more")
        return self._families[table]

    def _read_sorted(self, family: _Family, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.zeros((ids.size, family.width), dtype=np.uint8)
        found = np.zeros(ids.size, dtype=np.bool_)
        size = min(max(-(-ids.size // self._threads), _LEAST_PART), SLICE)
        parts = [slice(i, i + size) for i in range(0, ids.size, size)]
        if self._pool is None or len(parts) == 1:
            for part in parts:
                self._read_part(family, ids[part], rows[part], found[part])
            return rows, found
        tasks = [self._pool.submit(self._read_part, family, ids[p], rows[p], found[p]) for p in parts]
        # All of them end before any failure is told, so that closing finds no call in flight.
        wait(tasks)
        for task in tasks:
            task.result()
        return rows, found

    def _read_part(self, family: _Family, ids: np.ndarray, rows: np.ndarray, found: np.ndarray) -> None:
        with rocks_errors(self.path):
            values = family.rows[_keys(ids)]
            found[:] = np.fromiter(map(is_not, values, repeat(None)), dtype=np.bool_, count=len(values))
            if found.all():
                rows[:] = as_rows(values, family.width)
            else:
                rows[found] = as_rows(list(filter(None, values)), family.width)

    def write(self, batch: Mapping[str, Rows]) -> None:
        if self._suspect is not None and self.wal:
            self._heal()
        with self._gate.call():
            self.check_batch(batch)
            if self.read_only:
                raise read_only_error(self.path, "it was opened with read_only=True")
            whole = rocksdict.WriteBatch(raw_mode=True)
            for table, (ids, rows) in batch.items():
                self._put(whole, self._family(table), ids.numpy(), rows)
            if whole.is_empty():
                return
            self._wait_for_room()
            with self._suspecting(), self._commit:
                self._db.write(whole, self._write_options)

    def _put(self, whole: Any, family: _Family, ids: np.ndarray, rows: Tensor) -> None:
        for first in range(0, ids.size, SLICE):
            part = slice(first, first + SLICE)
            values = np.ascontiguousarray(rows[part].numpy()).view(f"V{family.width}").ravel().tolist()
            deque(map(whole.put, _keys(ids[part]), values, repeat(family.handle)), maxlen=0)

    def _wait_for_room(self) -> None:
        # RocksDB would wait as well, but with Python's global lock in its hands.
        end = time.monotonic() + _STALL_S
        while self._db.property_int_value("rocksdb.is-write-stopped") and time.monotonic() < end:
            time.sleep(_STALL_POLL_S)

    @contextmanager
    def _suspecting(self) -> Iterator[None]:
        try:
            with rocks_errors(self.path):
                yield
        except StoreError as error:
            self._suspect = error
            raise
        self._suspect = None

    def _heal(self) -> None:
        # A log that failed once refuses every later write until the database is opened anew; the log on disk holds
        # every write that returned. Replaying it needs space: without it the reads that still work would stop too.
        with self._gate.alone():
            if self._suspect is None:
                return
            with os_errors(self.path):
                need = sum(f.stat().st_size for f in self.path.glob("*.log")) + _HEAL_BYTES
                free = shutil.disk_usage(self.path).free
            if free < need:
                raise full_error(self.path, f"a write failed, and trying again needs {need} bytes, {free} are free")
            self._release()
            self._open()
            self._suspect = None

    def scan(self, table: str, start: int = 0, window: int = 65536) -> Iterator[Rows]:
        with self._gate.call():
            self.check_scan(table, start, window)
            family = self._family(table)
            with rocks_errors(self.path):
                cursor = ScanCursor(family.rows, family.width, start, scan_options())
            self._cursors.add(cursor)
        return self._windows(cursor, window)

    def _windows(self, cursor: ScanCursor, window: int) -> Iterator[Rows]:
        count = window
        while count == window:
            with self._gate.call(), rocks_errors(self.path):
                ids, rows = cursor.next(window)
            count = ids.numel()
            if count:
                yield ids, rows

    def flush(self) -> None:
        if self._suspect is not None and self.wal:
            self._heal()
        with self._gate.call():
            self._flush()

    def _flush(self) -> None:
        if self.read_only:
            return
        with self._suspecting():
            if self.wal:
                self._db.flush_wal(True)
            for table in self.row_bytes:
                self._family(table).rows.flush()

    def checkpoint(self, path: Path) -> None:
        """As the contract says, by hard links on the same file system, whole or not at all; writes wait briefly."""
        with self._gate.call():
            # First and without the lock: RocksDB would do it while it holds Python's global lock.
            self._flush()
            with directory.staged(Path(path).absolute()) as temp, rocks_errors(self.path), self._commit:
                rocksdict.Checkpoint(self._db).create_checkpoint(str(temp))
                directory.write_format(temp, directory.read_format(self.path), replace=True)

    def close(self) -> None:
        error: StoreError | None = None
        with self._gate.closing() as first:
            if not first:
                return
            try:
                if not self.wal and self._db is not None:
                    self._flush()
            except StoreError as failure:
                error = failure
            self._release()
            if self._pool is not None:
                self._pool.shutdown()
        if error is not None:
            raise error

    def _release(self) -> None:
        for cursor in list(self._cursors):
            cursor.release()
        self._cursors.clear()
        parts = [family.rows for family in self._families.values()] + [self._db]
        for family in self._families.values():
            family.rows = family.handle = None
        self._families, self._db = {}, None
        for part in filter(None, parts):
            try:
                part.close()
            except Exception as error:
                # A log that failed before fails again here; what was acknowledged is on disk, the rest was raised.
                if type(error) is not Exception:
                    raise


def _families_in(path: Path) -> list[str]:
    if (path / "CURRENT").exists():
        return rocksdict.Rdict.list_cf(str(path), rocksdict.Options(raw_mode=True))
    # RocksDB would make an empty database over these.
    if any(path.glob("*.sst")) or any(path.glob("*.log")):
        raise CorruptError(f"the row store at {path} has rows but no CURRENT file; restore it from a snapshot")
    return []


def remove_store(path: Path | str) -> None:
    """Delete the row store at `path`.

    Raises:
        ForeignDirectoryError: not a row store, or one with other files in it; nothing is deleted.
        StoreLockedError: it is open; nothing is deleted.
    """
    path = Path(path).absolute()
    directory.read_format(path)
    with rocks_errors(path):
        others = [f.name for f in path.iterdir() if f.is_dir() or not any(f.match(own) for own in _OWN_FILES)]
        if others:
            raise ForeignDirectoryError(
                f"the row store at {path} also holds {', '.join(sorted(others)[:3])}; move that away first"
            )
        rocksdict.Rdict.destroy(str(path), rocksdict.Options(raw_mode=True))
        # The format file goes last, so that a removal cut short can be repeated.
        for file in sorted(path.iterdir(), key=lambda f: f.name == directory.FORMAT_FILE):
            file.unlink()
        path.rmdir()


__all__ = ["RocksOptions", "RocksRowStore", "remove_store"]
