"""The row store of serving: an immutable base, rows updated since in RocksDB, and the latest in memory and a journal.

Rows are read from the newest layer that has them. A commit costs one write to the journal; one thread applies what was
published to RocksDB in the background and cuts the journal.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchrec_turbossd.errors import ClosedError, ConfigError, CorruptError, InputError, StoreError, UnknownTableError
from torchrec_turbossd.store import layered_form
from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.store.gate import Gate
from torchrec_turbossd.store.journal import Batch, Journal
from torchrec_turbossd.store.rocks_options import RocksOptions
from torchrec_turbossd.store.updated_base import UpdatedBase
from torchrec_turbossd.store.write_back import Applying, Reserved, WriteBackStore

APPLY_ROWS = 256
"""Rows given to RocksDB at once: it keeps Python's global lock for about 3 ms for each 1,000."""

SEGMENT_BYTES = 64 << 20
_REPLAY_BYTES = 8 << 20
_RETRY_S = 1.0


@dataclass(frozen=True)
class Committed:
    """A batch in the journal, not visible yet. `sequence` counts the commits of a store; 0 is an empty batch."""

    sequence: int
    reserved: Reserved


class LayeredRowStore(RowStore):
    """Rows in three layers: those committed lately, those updated since the base was written, the base.

    A `write` that returned survives the end of the process, `flush` makes it survive the end of the machine; a crash
    loses whole writes from the end and never part of one. What the journal holds is read back when the store is opened,
    and applied in the background.

    When rows cannot be applied, or there is no space, they stay in memory and in the journal, readable; later commits
    and flushes raise that failure until a try, one each second, succeeds.

    Args:
        path: a directory of its own; made with its parents when `create`.
        row_bytes: bytes of one row by table. Tables of the store that are not named are kept, untouched.
        rows: rows of each table: those below have a bit each. Ids beyond may be written as well, and are looked up in
            RocksDB first.
        read_threads: threads that share the reads from RocksDB.
        create: make the store.
        options: RocksDB's memory, disk and threads; default `RocksOptions()`.
        max_pending_bytes: rows and ids in memory that are not in RocksDB yet; a `commit` waits for room.

    Raises:
        ConfigError: an argument that cannot be honoured.
        ForeignDirectoryError, FormatVersionError, StoreLockedError, ReadOnlyStoreError, StoreFullError, CorruptError:
            what the directory is.
        StoreError: no store there, or one of other tables, row sizes or numbers of rows.
    """

    def __init__(
        self,
        path: Path | str,
        row_bytes: Mapping[str, int],
        rows: Mapping[str, int],
        *,
        read_threads: int = 2,
        create: bool = True,
        options: RocksOptions | None = None,
        max_pending_bytes: int = 256 << 20,
    ) -> None:
        layered_form.check_sizes(row_bytes, rows)
        if read_threads < 1 or max_pending_bytes < 1:
            raise ConfigError(
                f"read_threads and max_pending_bytes must be at least 1, got {read_threads} and {max_pending_bytes}"
            )
        super().__init__(row_bytes)
        self.path = Path(path).absolute()
        self._gate = Gate(f"the row store at {self.path}")
        self._writing = threading.Lock()
        self._order, self._cutting = threading.Lock(), threading.Lock()
        self._unpublished: deque[Committed] = deque()
        self._published = 0
        self._closing = False
        self._may_apply = threading.Event()
        tables = layered_form.prepare(self.path, row_bytes, rows, create=create)
        with contextlib.ExitStack() as stack:
            self._disk = UpdatedBase(self.path, tables, read_threads=read_threads, options=options)
            stack.callback(self._disk.close)
            self._journal = Journal(self.path / layered_form.JOURNAL)
            stack.callback(self._journal.close)
            how = Applying(rows=APPLY_ROWS, before=self._before_applying, after=self._cut, retry_s=_RETRY_S)
            self._memory = WriteBackStore(self._disk, max_pending_bytes=max_pending_bytes, applying=how)
            stack.callback(self._memory.discard)
            self._replay()
            stack.pop_all()

    def _replay(self) -> None:
        try:
            for sequence, batch in _grouped(map(self._checked, self._journal.replay())):
                self._memory.publish(self._memory.reserve(batch), sequence)
                if 2 * self._memory.pending_bytes > self._memory.max_pending_bytes:
                    self._may_apply.set()
        finally:
            self._may_apply.set()

    def _checked(self, record: tuple[int, Batch]) -> tuple[int, Batch]:
        try:
            self._memory.check_batch(record[1])
        except (InputError, UnknownTableError) as error:
            raise CorruptError(
                f"the journal in {self.path} has rows of other tables ({error}); restore the store from a snapshot"
            ) from error
        return record

    def _before_applying(self, sequence: int) -> None:
        # Opening is not to wait for what it competes with.
        self._may_apply.wait()
        # RocksDB writes rows out when it likes. What the journal could still lose must not be there in part.
        # A journal that failed can lose nothing more: these rows are then best in RocksDB.
        if self._journal.synced < sequence and not self._journal.failed:
            self._journal.sync()

    def _cut(self, applied: int) -> None:
        # What fails here is tried again after the next batch; until then the journal is longer than it need be.
        # A failure of another kind is logged by who calls this, and tried again as well.
        with self._cutting, contextlib.suppress(StoreError):
            if self._closing:
                return
            if self._journal.open_bytes >= SEGMENT_BYTES:
                self._journal.rotate()
            done = [s for s in self._journal.complete if s.last <= applied]
            if done:
                self._disk.flush()
                self._journal.drop(done)

    @property
    def pending_bytes(self) -> int:
        """Bytes of ids and rows that are not in RocksDB yet."""
        return self._memory.pending_bytes

    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        with self._gate.call():
            self.check_ids(table, ids)
            return self._memory.read(table, ids)

    def write(self, batch: Mapping[str, Rows]) -> None:
        with self._writing:
            self.publish(self.commit(batch))

    def commit(self, batch: Mapping[str, Rows]) -> Committed:
        """The first half of a `write`: from now on the batch survives the end of the process; no read sees it yet.

        Waits for room in memory. A batch that is never published, because the process ends or a later one is published
        first, is there after the next opening, unless it was cut by then.

        Raises:
            InputError, UnknownTableError: a batch that cannot be written.
            StoreFullError, ReadOnlyStoreError, StoreError: the journal cannot be written, or rows committed earlier
                cannot be applied; the batch left nothing behind.
        """
        with self._gate.call():
            self.check_batch(batch)
            reserved = self._memory.reserve(batch)
            if not reserved.parts:
                return Committed(0, reserved)
            try:
                sequence = self._journal.append(reserved.tensors())
            except BaseException:
                self._memory.release(reserved)
                raise
            committed = Committed(sequence, reserved)
            self._unpublished.append(committed)
            return committed

    def publish(self, committed: Committed) -> None:
        """The second half: every read that starts after it sees the batch. Touches no disk and waits for nothing.

        Batches are published in the order of their commits; one that was passed over never can be.

        Raises:
            InputError: a later batch was published already, or this one was.
            ClosedError: the store is closed; the batch is in the journal.
        """
        if not committed.reserved.parts:
            return
        with self._order:
            if self._closing:
                raise ClosedError(f"the row store at {self.path} is closed; the batch is there when it is opened again")
            if committed.sequence <= self._published:
                raise InputError(
                    f"batch {committed.sequence} cannot be published after batch {self._published}; publish in the "
                    f"order of commits, each once"
                )
            while self._unpublished and self._unpublished[0].sequence < committed.sequence:
                self._memory.release(self._unpublished.popleft().reserved)
            self._unpublished.popleft()
            self._published = committed.sequence
            self._memory.publish(committed.reserved, committed.sequence)

    def scan(self, table: str, start: int = 0, window: int = 65536) -> Iterator[Rows]:
        with self._gate.call():
            self.check_scan(table, start, window)
            windows = self._memory.scan(table, start, window)
        return self._windows(windows)

    def _windows(self, windows: Iterator[Rows]) -> Iterator[Rows]:
        while True:
            with self._gate.call():
                part = next(windows, None)
            if part is None:
                return
            yield part

    def flush(self) -> None:
        """Make everything committed durable. Raises also what keeps rows from being applied."""
        with self._gate.call():
            self._journal.sync()
            self._memory.settle()

    def drain(self) -> None:
        """Apply to RocksDB what was published before this call, and make it durable there; writes go on meanwhile.

        For those about to hold writes back for a `checkpoint`, which then has little left to apply.

        Raises:
            StoreError: what keeps rows from being applied; they stay in memory and in the journal.
        """
        with self._gate.call():
            self._memory.flush()

    def checkpoint(self, path: Path) -> None:
        """As the contract says: hard links on the same file system, and no journal. Applies what is in memory first."""
        with self._gate.call():
            # The most of it before the background thread has to stand still.
            self._memory.flush()
            self._memory.checkpoint(path)

    def close(self) -> None:
        """Apply everything, cut the journal and release; where that fails the store stays open for another try."""
        with self._gate.closing() as first:
            if not first:
                return
            self._refuse_publishing(True)
            try:
                self._memory.settle(retry=True)
                self._memory.flush()
                with self._cutting:
                    # While RocksDB's lock still keeps others out.
                    self._journal.drop([s for s in self._journal.segments if s.last <= self._memory.applied])
            except BaseException:
                self._refuse_publishing(False)
                raise
            self._journal.close()
            self._memory.close()

    def _refuse_publishing(self, refuse: bool) -> None:
        with self._order:
            self._closing = refuse

    def discard(self) -> None:
        """Close without applying what is in memory, which the journal keeps: for a store that is deleted next."""
        with self._gate.closing() as first:
            if first:
                self._refuse_publishing(True)
                self._memory.discard()
                self._journal.close()


def _grouped(records: Iterable[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
    """Batches that follow each other as larger ones, each with the number of its last."""
    held: dict[str, list[Rows]] = {}
    size = last = 0
    for sequence, batch in records:
        for table, part in batch.items():
            held.setdefault(table, []).append(part)
            size += part[0].nbytes + part[1].nbytes
        last = sequence
        if size >= _REPLAY_BYTES:
            yield last, _joined(held)
            held, size = {}, 0
    if held:
        yield last, _joined(held)


def _joined(held: Mapping[str, Sequence[Rows]]) -> Batch:
    # By NumPy, which needs no threads of its own for it.
    return {
        table: (torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(rows)))
        for table, parts in held.items()
        for ids, rows in [zip(*parts, strict=True)]
    }


__all__ = ["APPLY_ROWS", "SEGMENT_BYTES", "Committed", "LayeredRowStore"]
