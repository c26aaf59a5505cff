"""An append-only log of batches of rows: a batch is committed once its record is in it.

The format is in docs/formats/journal.md.
"""

from __future__ import annotations

import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrec_turbossd.errors import ClosedError, CorruptError, FormatVersionError, StoreError
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.store.directory import sync_directory
from torchrec_turbossd.store.faults import os_errors

FORMAT = "torchrec_turbossd.journal"
FORMAT_VERSION = 1

_NAME = re.compile(r"journal-(\d{1,18})\.log")
_HEADER = struct.Struct("<32sIQ")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _HEADER.size + _CRC.size
_RECORD = struct.Struct("<QI")
_RECORD_BYTES = _RECORD.size + _CRC.size
_PAYLOAD = struct.Struct("<QI")
_TABLE = struct.Struct("<HIQ")

Batch = dict[str, Rows]


@dataclass
class Segment:
    """One file of a journal: its number, its path, the last sequence number in it or before it, and its bytes."""

    number: int
    path: Path
    last: int = 0
    size: int = 0


def segments_in(path: Path) -> list[Segment]:
    """The segments in a directory, first to last, of which nothing has been read."""
    with os_errors(path):
        found = [(m, f) for f in path.iterdir() if (m := _NAME.fullmatch(f.name))] if path.is_dir() else []
    return sorted((Segment(int(m[1]), f) for m, f in found), key=lambda s: s.number)


class Journal:
    """A directory of segments, which one process at a time has open. Safe to call from several threads.

    A batch whose `append` returned survives the end of the process, one that `sync` followed the end of the machine. An
    `append` that raised left nothing behind.

    Opening reads every segment once (`replay` gives the batches); the first append begins a new one.

    Args:
        path: made when it is not there.

    Raises:
        CorruptError: damage anywhere but at the end of the last segment, where a record may be cut short.
        FormatVersionError: a newer release wrote it.
        StoreError: the file system refuses.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._handle = -1
        self._failure: str | None = None
        self._unlinking = False
        self._closed = False
        with os_errors(self.path):
            self.path.mkdir(exist_ok=True)
        self._segments = segments_in(self.path)
        self._last = 0
        self._check_numbers()
        for segment in self._segments:
            segment.last = self._last
            for sequence, _ in self._read(segment):
                self._last = segment.last = sequence
            # What a killed process left may be in memory only.
            _sync_file(segment.path)
        self._synced = self._last
        self._next = self._segments[-1].number + 1 if self._segments else 1
        self._drop_torn_start()

    @property
    def last(self) -> int:
        """The sequence number of the last batch; 0 when there was none."""
        return self._last

    @property
    def synced(self) -> int:
        """The sequence number up to which `sync` made batches durable."""
        return self._synced

    @property
    def failed(self) -> bool:
        """Something could not be undone: nothing more can be appended or made durable."""
        return self._failure is not None

    @property
    def segments(self) -> Sequence[Segment]:
        """Those there are, first to last; the last one may still grow."""
        with self._lock:
            return tuple(self._segments)

    @property
    def complete(self) -> Sequence[Segment]:
        """Those that grow no more, first to last."""
        with self._lock:
            return tuple(self._segments[:-1] if self._handle >= 0 else self._segments)

    @property
    def open_bytes(self) -> int:
        """Bytes of the segment that appends go to."""
        with self._lock:
            return self._segments[-1].size if self._handle >= 0 else 0

    def _check_numbers(self) -> None:
        for one, following in zip(self._segments, self._segments[1:], strict=False):
            if following.number != one.number + 1:
                raise CorruptError(
                    f"{self.path} lacks segment {one.number + 1} of its journal; restore the store from a snapshot"
                )

    def _drop_torn_start(self) -> None:
        # A segment that was begun and no more. Its number is free for the next.
        if self._segments and self._segments[-1].size == 0:
            self._next -= 1
            with os_errors(self.path):
                self._segments.pop().path.unlink()

    def replay(self) -> Iterator[tuple[int, Batch]]:
        """(sequence number, batch) of every record that was there at opening, in order; before the first append."""
        for segment in self.segments:
            yield from self._read(segment)

    def _read(self, segment: Segment) -> Iterator[tuple[int, Batch]]:
        """Records of a segment; sets its `size`. A torn end of the last one is cut off its file."""
        with os_errors(segment.path):
            data = np.fromfile(segment.path, dtype=np.uint8)
        is_last = segment is self._segments[-1]
        at = _check_header(segment, data, may_be_torn=is_last)
        previous: int | None = None
        while 0 < at < data.size:
            payload = _payload(data, at)
            if payload is None:
                if is_last and _is_torn(data, at):
                    break
                raise CorruptError(f"{segment.path} is damaged at byte {at}; restore the store from a snapshot")
            sequence, batch = _parse(payload, segment.path)
            if previous is not None and sequence <= previous:
                raise CorruptError(f"{segment.path} is out of order at byte {at}; restore the store from a snapshot")
            previous = sequence
            at += _RECORD_BYTES + payload.size
            yield sequence, batch
        segment.size = at
        if at < data.size:
            with os_errors(segment.path):
                os.truncate(segment.path, at)

    def append(self, batch: Mapping[str, Rows]) -> int:
        """Write one record; returns its sequence number, which is above those before.

        Raises:
            StoreFullError, ReadOnlyStoreError, StoreError: what the file system says; nothing of the record stays.
            StoreError: an earlier failure could not be undone; open the journal again.
        """
        with self._lock:
            self._raise_if_unusable()
            sequence = self._last + 1
            parts = _record(sequence, batch)
            with os_errors(self.path):
                if self._handle < 0:
                    self._begin()
                segment = self._segments[-1]
                before = segment.size, segment.last, self._last
                try:
                    written = _write_all(self._handle, parts)
                    segment.size += written
                    self._last = segment.last = sequence
                except BaseException:
                    # Also where an interrupt came after the bytes: their number must not be given twice.
                    self._take_back(before[0])
                    segment.size, segment.last, self._last = before
                    raise
        return sequence

    def _raise_if_unusable(self) -> None:
        if self._closed:
            raise ClosedError(f"the journal at {self.path} is closed; open it again to use it")
        if self._failure is not None:
            raise StoreError(f"the journal at {self.path} takes nothing more: {self._failure}; open the store again")

    def _begin(self) -> None:
        number = self._next
        segment = Segment(number, self.path / f"journal-{number:08d}.log", last=self._last)
        handle = os.open(segment.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            head = _HEADER.pack(FORMAT.encode(), FORMAT_VERSION, number)
            segment.size = _write_all(handle, [head, _CRC.pack(zlib.crc32(head))])
            os.fsync(handle)
            sync_directory(self.path)
        except BaseException:
            os.close(handle)
            segment.path.unlink()
            raise
        self._handle, self._next = handle, number + 1
        self._segments.append(segment)

    def _take_back(self, size: int) -> None:
        try:
            os.ftruncate(self._handle, size)
        except BaseException as error:
            self._failure = f"a failed write could not be taken back ({error!r})"
            if not isinstance(error, OSError):
                raise

    def sync(self) -> None:
        """Make every batch durable whose `append` returned before this call; appends go on meanwhile."""
        with self._syncing:
            with self._lock:
                self._raise_if_unusable()
                handle, last = self._handle, self._last
            if handle < 0 or self._synced >= last:
                return
            try:
                with os_errors(self.path):
                    os.fdatasync(handle)
            except StoreError as error:
                # The system forgets which bytes did not reach the disk: a second try would prove nothing.
                self._failure = f"it could not be made durable ({error})"
                raise
            self._synced = last

    def rotate(self) -> None:
        """Make the open segment durable and complete: the next append begins another."""
        # The most of it without the lock.
        self.sync()
        with self._syncing, self._lock:
            self._raise_if_unusable()
            if self._handle < 0:
                return
            # Only the last segment may end in a record cut short, also after the end of the machine.
            with os_errors(self.path):
                os.fdatasync(self._handle)
            self._synced = self._last
            os.close(self._handle)
            self._handle = -1

    def drop(self, segments: Sequence[Segment]) -> None:
        """Delete the first segments, of which the last one may be the open one.

        They go one by one, so that what a crash leaves is the end of the journal, without gaps. What failed may be
        tried again, also with segments that went before the failure.
        """
        with self._syncing, self._lock:
            if self._handle >= 0 and self._segments[-1] in segments:
                os.close(self._handle)
                self._handle = -1
        # One whose end was not made durable must not outlive those after it.
        self._sync_unlinked()
        for segment in segments:
            with os_errors(self.path), self._lock:
                self._unlinking = True
                segment.path.unlink(missing_ok=True)
                self._segments = [s for s in self._segments if s.path != segment.path]
            self._sync_unlinked()

    def _sync_unlinked(self) -> None:
        if self._unlinking:
            with os_errors(self.path):
                sync_directory(self.path)
            self._unlinking = False

    def close(self) -> None:
        """Let go of the files. Closing twice is allowed."""
        with self._syncing, self._lock:
            self._closed = True
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1


def _sync_file(path: Path) -> None:
    with os_errors(path):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_all(handle: int, parts: Sequence[Any]) -> int:
    """Write buffers with as few calls as the system lets; returns their bytes."""
    views = [memoryview(p).cast("B") for p in parts]
    total = 0
    while views:
        done = os.writev(handle, views[:512])
        total += done
        while views and done >= len(views[0]):
            done -= len(views.pop(0))
        if done:
            views[0] = views[0][done:]
    return total


def _record(sequence: int, batch: Mapping[str, Rows]) -> list[Any]:
    """The buffers of one record."""
    parts: list[Any] = [_PAYLOAD.pack(sequence, len(batch))]
    for table, (ids, rows) in batch.items():
        name = table.encode()
        parts += [_TABLE.pack(len(name), rows.shape[1], ids.numel()), name]
        parts += [np.ascontiguousarray(part.numpy()) for part in (ids, rows) if part.numel()]
    check = length = 0
    for part in parts:
        view = memoryview(part).cast("B")
        check, length = zlib.crc32(view, check), length + len(view)
    head = _RECORD.pack(length, check)
    return [head + _CRC.pack(zlib.crc32(head)), *parts]


def _check_header(segment: Segment, data: np.ndarray, *, may_be_torn: bool) -> int:
    """Where a segment's records begin; 0 for one that was begun and no more."""
    head = data[:_HEADER_BYTES].tobytes()
    if may_be_torn and (len(head) < _HEADER_BYTES or not data.any()):
        return 0
    advice = "restore the store from a snapshot"
    if len(head) < _HEADER_BYTES or not head.startswith(FORMAT.encode().ljust(32, b"\0")):
        raise CorruptError(f"{segment.path} is not a journal; {advice}")
    _, version, number = _HEADER.unpack_from(head)
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{segment.path} has journal format {version}, this release reads up to {FORMAT_VERSION}; use a newer one"
        )
    if _CRC.unpack_from(head, _HEADER.size) != (zlib.crc32(head[: _HEADER.size]),) or number != segment.number:
        raise CorruptError(f"the header of {segment.path} is damaged; {advice}")
    return _HEADER_BYTES


def _length(data: np.ndarray, at: int) -> tuple[int, int] | None:
    """(length, checksum) of the payload at `at`, or None where the record's own head is cut short or damaged."""
    head = data[at : at + _RECORD_BYTES].tobytes()
    if len(head) < _RECORD_BYTES or _CRC.unpack_from(head, _RECORD.size) != (zlib.crc32(head[: _RECORD.size]),):
        return None
    length, check = _RECORD.unpack_from(head)
    return length, check


def _payload(data: np.ndarray, at: int) -> np.ndarray | None:
    found = _length(data, at)
    if found is None:
        return None
    payload = data[at + _RECORD_BYTES : at + _RECORD_BYTES + found[0]]
    return payload if payload.size == found[0] and zlib.crc32(payload.data) == found[1] else None


def _is_torn(data: np.ndarray, at: int) -> bool:
    """Whether the record at `at`, which does not read, is what a cut-short write leaves at the end of a file."""
    found = _length(data, at)
    # A file system may leave zeros where the end of the machine kept bytes from the disk.
    some = np.flatnonzero(data[at:])
    end = at + (int(some[-1]) + 1 if some.size else 0)
    return at + _RECORD_BYTES + (found[0] if found is not None else 0) >= end


def _parse(payload: np.ndarray, path: Path) -> tuple[int, Batch]:
    try:
        sequence, tables = _PAYLOAD.unpack_from(payload.data)
        at, batch = _PAYLOAD.size, {}
        for _ in range(tables):
            name_bytes, row_bytes, count = _TABLE.unpack_from(payload.data, at)
            at += _TABLE.size
            name = payload[at : at + name_bytes].tobytes().decode()
            at += name_bytes
            ids = payload[at : at + 8 * count].copy().view(np.int64)
            at += 8 * count
            rows = payload[at : at + row_bytes * count].reshape(count, row_bytes)
            at += row_bytes * count
            batch[name] = torch.from_numpy(ids), torch.from_numpy(rows)
    except (struct.error, ValueError) as error:
        raise CorruptError(
            f"{path} holds a record that is none ({error}); restore the store from a snapshot"
        ) from error
    return sequence, batch


__all__ = ["FORMAT", "FORMAT_VERSION", "Batch", "Journal", "Segment", "segments_in"]
