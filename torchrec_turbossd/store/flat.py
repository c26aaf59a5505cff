"""One table's rows in a file that never changes: fixed-stride records with checksums, read through a memory map.

The format is in docs/formats/flat.md.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchrec_turbossd.errors import CorruptError, FormatVersionError, InputError, StoreError
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.store.faults import os_errors
from torchrec_turbossd.store.mapped_file import PAGE_BYTES, MappedFile
from torchrec_turbossd.store.records import RecordForm

FORMAT = "torchrec_turbossd.flat"
FORMAT_VERSION = 1
ROWS_SUFFIX, IDS_SUFFIX = ".rows", ".ids"
HEADER_BYTES = PAGE_BYTES
"""So that records of whole pages stay whole."""

_HEADER = struct.Struct("<32sIIQI")
_CHECK = struct.Struct("<I")
_PAGE_IDS = PAGE_BYTES // 8
_STEPS = (256, 128, 64, 32, 16, 8, 4, 2, 1, 1)
"""Of a search in a page: any number of ids up to all of them may be below."""
_IDS_AT_ONCE = 16_000
"""Few enough that torch does what is to be done with them in the calling thread: many threads read at once."""
_WRITE_IDS = 1 << 20
_SMALL_READ, _SAMPLES = 64, 8
_SLOW_S, _FAST_S = 3e-6, 1.5e-6


def rows_file(path: Path) -> Path:
    """The file of records of the flat table `path`."""
    return path.with_name(path.name + ROWS_SUFFIX)


def ids_file(path: Path) -> Path:
    """The file of ids of the flat table `path`, which one with the ids 0, 1, 2, ... lacks."""
    return path.with_name(path.name + IDS_SUFFIX)


class FlatWriter:
    """Writes a flat table from first to last id.

    The files are whole after `finish`; those of a writer that was closed before are refused by `FlatTable`.

    Args:
        path: without suffix; the files must not exist.
        row_bytes: bytes of one row.

    Raises:
        StoreFullError, ReadOnlyStoreError, StoreError: what the file system says, here and in every method.
    """

    def __init__(self, path: Path | str, row_bytes: int) -> None:
        self.path, self.rows = Path(path).absolute(), 0
        self._form = RecordForm(row_bytes)
        self._last = -1
        self._samples: list[Tensor] = []
        self._rows = self._ids = -1
        with os_errors(self.path):
            self._rows = _create(rows_file(self.path))
            self._put(self._rows, torch.zeros(HEADER_BYTES, dtype=torch.uint8))

    def append(self, ids: Tensor, rows: Tensor) -> None:
        """Write rows [N, row_bytes] uint8 of `ids` [N] int64, which ascend and are above those written before.

        Raises `InputError`, having written nothing, where they do not.
        """
        if ids.numel() == 0:
            return
        self._check(ids, rows)
        ids = ids.contiguous()
        with os_errors(self.path):
            self._append_ids(ids)
            for first in range(0, ids.numel(), self._form.window):
                part = slice(first, first + self._form.window)
                self._put(self._rows, self._form.pack(ids[part], rows[part]))
        self.rows, self._last = self.rows + ids.numel(), int(ids[-1])

    def _check(self, ids: Tensor, rows: Tensor) -> None:
        if self._rows < 0:
            raise StoreError(f"{self.path} is finished; a flat table cannot be added to")
        want = (ids.numel(), self._form.row_bytes)
        if tuple(rows.shape) != want or rows.dtype != torch.uint8 or ids.dtype != torch.int64:
            raise InputError(
                f"a flat table takes int64 ids and {want} uint8 rows, got {ids.dtype} and {tuple(rows.shape)} "
                f"{rows.dtype}"
            )
        in_order = ids.numpy()
        if in_order[0] <= self._last or not (in_order[1:] > in_order[:-1]).all():
            raise InputError(f"ids of a flat table ascend, each once, from above {self._last}; sort them first")

    def _append_ids(self, ids: Tensor) -> None:
        if self._ids < 0:
            if int(ids[-1]) == self.rows + ids.numel() - 1:
                return
            self._ids = _create(ids_file(self.path))
            for first in range(0, self.rows, _WRITE_IDS):
                self._put_ids(first, torch.arange(first, min(first + _WRITE_IDS, self.rows)))
        self._put_ids(self.rows, ids)

    def _put_ids(self, place: int, ids: Tensor) -> None:
        self._samples.append(ids[-place % _PAGE_IDS :: _PAGE_IDS].clone())
        self._put(self._ids, ids)

    @staticmethod
    def _put(handle: int, data: Tensor) -> None:
        left = data.numpy().data.cast("B")
        while left:
            left = left[os.write(handle, left) :]

    def finish(self) -> None:
        """Make the table whole and durable."""
        if self._rows < 0:
            raise StoreError(f"{self.path} is finished already, or was closed")
        try:
            with os_errors(self.path):
                if self._ids >= 0:
                    padding = torch.full((-self.rows % _PAGE_IDS,), torch.iinfo(torch.int64).max)
                    self._put(self._ids, torch.cat([padding, *self._samples]))
                    os.fsync(self._ids)
                os.fsync(self._rows)
                # Last, so that a header stands for records that are there.
                os.pwrite(self._rows, _header(self._form.row_bytes, self.rows, self._ids >= 0), 0)
                os.fsync(self._rows)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the files, finished or not. Closing twice is allowed."""
        for handle in (self._rows, self._ids):
            if handle >= 0:
                os.close(handle)
        self._rows = self._ids = -1


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def _header(row_bytes: int, rows: int, has_ids: bool) -> bytes:
    body = _HEADER.pack(FORMAT.encode(), FORMAT_VERSION, row_bytes, rows, has_ids)
    return body + _CHECK.pack(zlib.crc32(body))


class FlatTable:
    """Rows of one table that never change. Safe to call from several threads.

    A read of rows that are not in memory asks the disk for all of their pages at once, then waits; this is left out as
    long as rows come fast. The disk's own read errors end the process (SIGBUS), as with every memory map.

    Args:
        path: without suffix, as `FlatWriter` was given it.
        row_bytes: bytes of one row, as stored.

    Raises:
        CorruptError: the files are missing, unfinished, of another size than they say or of another kind of row.
        FormatVersionError: a newer release wrote them.
        StoreError: they cannot be read.
    """

    def __init__(self, path: Path | str, row_bytes: int) -> None:
        self.path = Path(path).absolute()
        self._form = RecordForm(row_bytes)
        self._files: list[MappedFile] = []
        try:
            self._open(row_bytes)
        except BaseException:
            self.close()
            raise
        self._cold = True

    def _open(self, row_bytes: int) -> None:
        records = self._map(rows_file(self.path))
        self.rows, has_ids = _read_header(records, row_bytes)
        records.check_size(HEADER_BYTES + self.rows * self._form.stride)
        self._records = records.view(torch.int32, HEADER_BYTES, (self.rows, self._form.words + 1))
        self._ids: Tensor | None = None
        if has_ids:
            pages = -(-self.rows // _PAGE_IDS)
            ids = self._map(ids_file(self.path))
            ids.check_size(pages * (PAGE_BYTES + 8))
            self._ids = ids.view(torch.int64, 0, (pages * _PAGE_IDS,))
            # The first id of each page: with these in memory a search reads one page.
            self._samples = ids.read(torch.int64, pages * PAGE_BYTES, pages)

    def _map(self, path: Path) -> MappedFile:
        with os_errors(path):
            if not path.exists():
                raise CorruptError(f"{path} is missing; restore the store from a snapshot")
            self._files.append(MappedFile(path))
        return self._files[-1]

    @property
    def is_dense(self) -> bool:
        """The ids are 0, 1, 2, ... up to `rows`."""
        return self._ids is None

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of `ids` [N] int64: ([N, row_bytes] uint8, found [N] bool); rows not found are zero bytes.

        Raises `CorruptError` for a row that fails its checksum.
        """
        start = time.perf_counter()
        ids = ids.contiguous()
        rows = torch.from_numpy(np.zeros((ids.numel(), self._form.row_bytes), dtype=np.uint8))
        found = torch.empty(ids.numel(), dtype=torch.bool)
        # Asking costs microseconds a row: few rows are asked for always, many when they are not in memory.
        ask = ids.numel() < _SMALL_READ or (self._cold and not self._is_in_memory(ids))
        for first in range(0, ids.numel(), _IDS_AT_ONCE):
            part = slice(first, first + _IDS_AT_ONCE)
            self._read_some(ids[part], rows[part], found[part], ask)
        if ids.numel() >= _SMALL_READ:
            took = (time.perf_counter() - start) / ids.numel()
            self._cold = took > (_FAST_S if ask else _SLOW_S)
        return rows, found

    def _is_in_memory(self, ids: Tensor) -> bool:
        """Whether a sample of `ids` says so."""
        some = ids[:: -(-ids.numel() // _SAMPLES)]
        places = some.clamp(max=self.rows - 1)
        if self._ids is not None:
            page = torch.from_numpy(self._pages_of(some))
            if not self._files[1].holds(page * PAGE_BYTES):
                return False
            # Not the rows themselves, whose places are in those pages, but close by.
            places = page * _PAGE_IDS
        return self.rows == 0 or self._files[0].holds(places * self._form.stride + HEADER_BYTES)

    def _read_some(self, ids: Tensor, rows: Tensor, found: Tensor, ask: bool) -> None:
        is_there, places = self._find(ids, ask)
        found.copy_(is_there)
        if places.numel() == ids.numel():
            self._gather(places, ids, rows, ask)
        elif places.numel():
            held = torch.empty(places.numel(), self._form.row_bytes, dtype=torch.uint8)
            self._gather(places, ids[is_there], held, ask)
            rows.numpy()[is_there.numpy()] = held.numpy()

    def _find(self, ids: Tensor, ask: bool) -> tuple[Tensor, Tensor]:
        """(found [N] bool, places of the M rows found)."""
        if self._ids is None or self.rows == 0:
            found = ids < self.rows
            return found, ids[found] if not bool(found.all()) else ids
        have = self._ids.numpy()
        places = self._search(have, ids, ask)
        is_there = (places < self.rows) & (have.take(np.minimum(places, self.rows - 1)) == ids.numpy())
        if not is_there.all():
            self._check_absent(have, places[~is_there], ids.numpy()[~is_there], ask)
            places = places[is_there]
        return torch.from_numpy(is_there), torch.from_numpy(places)

    def _pages_of(self, ids: Tensor) -> np.ndarray:
        """For each of `ids` the page of ids that it is in, if it is anywhere."""
        # NumPy searches in this thread: torch would share the work between threads, of which readers have their own.
        return np.maximum(np.searchsorted(self._samples.numpy(), ids.numpy(), side="right") - 1, 0)

    def _search(self, have: np.ndarray, ids: Tensor, ask: bool) -> np.ndarray:
        """For each of `ids` the place of the first id that is not below it, by reading one page of ids."""
        wanted, page = ids.numpy(), self._pages_of(ids)
        if ask:
            self._files[1].ask_for(page)
        start = page * _PAGE_IDS - 1
        below = np.zeros_like(page)
        for step in _STEPS:
            below += step * (have.take(start + below + step) < wanted)
        return np.minimum(start + 1 + below, self.rows)

    def _check_absent(self, have: np.ndarray, places: np.ndarray, ids: np.ndarray, ask: bool) -> None:
        # A damaged id leads a search astray. Its two neighbours in order, proved by their rows, prove an absence.
        for near, sign in ((places - 1, 1), (places, -1)):
            inside = (near >= 0) & (near < self.rows)
            held = have.take(near[inside])
            if ((ids[inside] - held) * sign <= 0).any():
                raise CorruptError(f"{ids_file(self.path)} is out of order; restore the store from a snapshot")
            rows = torch.empty(held.size, self._form.row_bytes, dtype=torch.uint8)
            self._gather(torch.from_numpy(near[inside]), torch.from_numpy(held), rows, ask)

    def _gather(self, places: Tensor, ids: Tensor, rows: Tensor, ask: bool) -> None:
        """Copy the records at `places`, which are of `ids`, to `rows`."""
        form = self._form
        if ask:
            self._ask_for_records(places)
        for first in range(0, places.numel(), form.chunk):
            part = slice(first, first + form.chunk)
            records = self._records.index_select(0, places[part])
            self._raise_if_wrong(form.unpack(records, ids[part], rows[part]))

    def _raise_if_wrong(self, row: int | None) -> None:
        if row is not None:
            raise CorruptError(
                f"row {row} in {rows_file(self.path)} fails its checksum; restore the store from a snapshot"
            )

    def _ask_for_records(self, places: Tensor) -> None:
        first = places * self._form.stride + HEADER_BYTES
        last = (first + (self._form.stride - 1)) // PAGE_BYTES
        first = first // PAGE_BYTES
        most = -(-self._form.stride // PAGE_BYTES) + 1
        pages = torch.minimum(first[:, None] + torch.arange(most), last[:, None])
        self._files[0].ask_for(pages.flatten().numpy())

    def scan(self, start: int = 0, window: int = 65536) -> Iterator[Rows]:
        """Rows with id >= start in ascending order, `window` at a time, read from first to last.

        Raises `CorruptError` for a row that fails its checksum.
        """
        at = self._find_start(start)
        form = self._form
        while at < self.rows:
            count = min(window, self.rows - at)
            records = self._files[0].read(torch.int32, HEADER_BYTES + at * form.stride, count * (form.words + 1))
            ids = torch.from_numpy(np.arange(at, at + count))
            if self._ids is not None:
                ids = self._files[1].read(torch.int64, at * 8, count)
            rows = torch.empty(count, form.row_bytes, dtype=torch.uint8)
            for first in range(0, count, form.chunk):
                part = slice(first, first + form.chunk)
                self._raise_if_wrong(form.unpack(records.view(count, -1)[part], ids[part], rows[part]))
            yield ids, rows
            at += count

    def _find_start(self, start: int) -> int:
        if self._ids is None or self.rows == 0:
            return min(start, self.rows)
        wanted = torch.tensor([start], dtype=torch.int64)
        # Finding proves the place, of an id that is there and of one that is not.
        self._find(wanted, True)
        return int(self._search(self._ids.numpy(), wanted, False)[0])

    def close(self) -> None:
        """Let go of the files; no other call may be in flight. Closing twice is allowed."""
        for file in self._files:
            file.close()
        self._files = []


def _read_header(records: MappedFile, row_bytes: int) -> tuple[int, bool]:
    """(rows of a table, whether there is a file of their ids), after checking what its first bytes say."""
    data = bytes(records.read(torch.uint8, 0, min(records.size, _HEADER.size + _CHECK.size)).numpy())
    advice = "restore the store from a snapshot"
    if not any(data):
        raise CorruptError(f"{records.path} was never finished; {advice}")
    if len(data) < _HEADER.size + _CHECK.size or not data.startswith(FORMAT.encode().ljust(32, b"\0")):
        raise CorruptError(f"{records.path} is not a flat table; {advice}")
    _, version, stored, rows, has_ids = _HEADER.unpack_from(data)
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{records.path} has flat format {version}, this release reads up to {FORMAT_VERSION}; use a newer release"
        )
    if _CHECK.unpack_from(data, _HEADER.size) != (zlib.crc32(data[: _HEADER.size]),):
        raise CorruptError(f"the header of {records.path} fails its checksum; {advice}")
    if stored != row_bytes:
        raise CorruptError(f"{records.path} has rows of {stored} bytes, {row_bytes} were expected; {advice}")
    return rows, bool(has_ids)


__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "HEADER_BYTES",
    "IDS_SUFFIX",
    "ROWS_SUFFIX",
    "FlatTable",
    "FlatWriter",
    "ids_file",
    "rows_file",
]
