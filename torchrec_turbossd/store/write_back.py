"""A row store that answers writes at once and applies them to another store in the background, in order."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchrec_turbossd.errors import ClosedError, ConfigError, StoreError
from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.store.gate import Gate

_LOG = logging.getLogger(__name__)

_MERGE_BYTES = 512 << 10
"""Small batches are merged up to this size, so that a read searches few of them and the store writes few."""

_MERGE_BYTES_IN_CHUNKS = 8 << 20
"""The same where the store is given rows in chunks, whatever the size of a batch."""

_Part = tuple[np.ndarray, np.ndarray]
"""(ids [N] int64, ascending and distinct; rows [N, row_bytes] uint8)."""


def _size(parts: Mapping[str, _Part]) -> int:
    return sum(ids.nbytes + rows.nbytes for ids, rows in parts.values())


def _tensors(parts: Mapping[str, _Part]) -> dict[str, Rows]:
    return {table: (torch.from_numpy(ids), torch.from_numpy(rows)) for table, (ids, rows) in parts.items()}


@dataclass(frozen=True)
class Reserved:
    """A batch that was checked and has room, by `WriteBackStore.reserve`."""

    parts: Mapping[str, _Part]
    size: int

    def tensors(self) -> dict[str, Rows]:
        """Its rows by table, ids ascending and distinct."""
        return _tensors(self.parts)


@dataclass(frozen=True)
class _Batch:
    parts: Mapping[str, _Part]
    size: int
    last: int

    def chunks(self, most: int | None) -> Iterator[dict[str, Rows]]:
        """All rows, `most` at once."""
        if most is None:
            yield _tensors(self.parts)
            return
        for table, (ids, rows) in self.parts.items():
            for first in range(0, ids.size, most):
                part = slice(first, first + most)
                yield _tensors({table: (ids[part], rows[part])})

    def then(self, newer: _Batch) -> _Batch:
        """Both as one write, in which rows of `newer` win."""
        parts = dict(self.parts)
        for table, (ids, rows) in newer.parts.items():
            if table in parts:
                ids = np.concatenate([parts[table][0], ids])
                rows = np.concatenate([parts[table][1], rows])
            parts[table] = _last_of_each(ids, rows)
        return _Batch(parts, _size(parts), newer.last)


def _last_of_each(ids: np.ndarray, rows: np.ndarray) -> _Part:
    """Copies, sorted by id, with the last of duplicate ids."""
    order = np.argsort(ids, kind="stable")
    in_order = ids[order]
    is_last = np.ones(order.size, dtype=np.bool_)
    is_last[:-1] = in_order[1:] != in_order[:-1]
    return in_order[is_last], rows[order[is_last]]


@dataclass(frozen=True, kw_only=True)
class Applying:
    """How batches go from memory to the store behind.

    rows: written at once; None is a batch as a whole, which `inner` then takes atomically.
    before: called with a batch's number before it is applied; what it raises counts as the store's failure.
    after: called with its number once it is; what it raises is logged, and it is called again after the next batch.
    retry_s: after a failure, seconds until the next try; None tries only when `flush` or `close` asks for it.
    """

    rows: int | None = None
    before: Callable[[int], None] | None = None
    after: Callable[[int], None] | None = None
    retry_s: float | None = None


class WriteBackStore(RowStore):
    """Rows of `inner`, with writes that wait for no disk.

    A `write` copies its rows and returns; one thread applies them to `inner`, in order and each as a whole (several
    small ones may become one). Reads see them from the moment `write` returns. They are durable after `flush`, and
    lost if the process ends before: this is not for writes that must survive once acknowledged.

    When `inner` fails, its rows stay here and readable. The next `write` or `flush` raises that failure, writes go on
    raising it, and each later `flush` (or `close`) tries again, so that nothing is lost once the cause is gone.

    Args:
        inner: the store behind; nobody else may write to it. `close` closes it.
        max_pending_bytes: ids and rows not yet applied; a `write` beyond waits until there is room. One larger than
            this waits until nothing is pending.
        applying: how batches go to `inner`.
    """

    def __init__(self, inner: RowStore, *, max_pending_bytes: int, applying: Applying | None = None) -> None:
        if max_pending_bytes < 1:
            raise ConfigError(f"max_pending_bytes must be at least 1, got {max_pending_bytes}")
        super().__init__(inner.row_bytes)
        self.inner = inner
        self.max_pending_bytes = max_pending_bytes
        self._how = applying or Applying()
        self._merge_bytes = _MERGE_BYTES if self._how.rows is None else _MERGE_BYTES_IN_CHUNKS
        self._whole = threading.Lock()
        """Held while a batch is applied: who holds it finds `inner` between two batches."""
        self._reserved_bytes = 0
        self._gate = Gate("the write-back row store")
        self._changed = threading.Condition()
        self._queue: deque[_Batch] = deque()
        self._pending_bytes = 0
        self._written = 0
        self._applied = 0
        self._applying = False
        self._stopping = False
        self._discarding = False
        self._error: Exception | None = None
        self._told = False
        self._thread = threading.Thread(target=self._apply_all, name="turbossd-write-back", daemon=True)
        self._thread.start()

    @property
    def pending_bytes(self) -> int:
        """Bytes of ids and rows that are not in `inner` yet."""
        return self._pending_bytes

    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        with self._gate.call():
            self.check_ids(table, ids)
            with self._changed:
                parts = [batch.parts[table] for batch in reversed(self._queue) if table in batch.parts]
            if not parts:
                return self.inner.read(table, ids)
            return self._read_through(table, ids, parts)

    def _read_through(self, table: str, ids: Tensor, parts: list[_Part]) -> tuple[Tensor, Tensor]:
        wanted = ids.numpy()
        rows = np.zeros((wanted.size, self.row_bytes[table]), dtype=np.uint8)
        found = np.zeros(wanted.size, dtype=np.bool_)
        left = np.arange(wanted.size)
        for have, values in parts:
            at = np.minimum(np.searchsorted(have, wanted[left]), have.size - 1)
            hit = have[at] == wanted[left]
            rows[left[hit]] = values[at[hit]]
            found[left[hit]] = True
            left = left[~hit]
            if not left.size:
                break
        if left.size:
            inner_rows, inner_found = self.inner.read(table, torch.from_numpy(wanted[left]))
            rows[left] = inner_rows.numpy()
            found[left] = inner_found.numpy()
        return torch.from_numpy(rows), torch.from_numpy(found)

    def write(self, batch: Mapping[str, Rows]) -> None:
        with self._gate.call():
            self.publish(self._reserve(batch))

    def reserve(self, batch: Mapping[str, Rows]) -> Reserved:
        """The first half of a `write`: check and copy `batch`, and wait for room. No read sees it."""
        with self._gate.call():
            return self._reserve(batch)

    def _reserve(self, batch: Mapping[str, Rows]) -> Reserved:
        self.check_batch(batch)
        parts = {t: _last_of_each(ids.numpy(), rows.numpy()) for t, (ids, rows) in batch.items() if ids.numel()}
        reserved = Reserved(parts, _size(parts))
        # Here and not where they are published, which must be quick.
        self._merge_last()
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._error is not None or self._has_room(reserved.size))
            self._raise_discarded()
            self._raise_kept()
            self._reserved_bytes += reserved.size
        return reserved

    def _has_room(self, size: int) -> bool:
        return not self._queue or self._pending_bytes + self._reserved_bytes + size <= self.max_pending_bytes

    def release(self, reserved: Reserved) -> None:
        """Give back the room of a batch that will not be published."""
        with self._changed:
            self._reserved_bytes -= reserved.size
            self._changed.notify_all()

    def publish(self, reserved: Reserved, number: int | None = None) -> None:
        """The second half: reads that start after it see the batch. Waits for nothing.

        Args:
            number: the batch's, above those before; by default the next.

        Raises:
            ClosedError: the store was closed or discarded.
        """
        with self._changed:
            self._reserved_bytes -= reserved.size
            self._raise_discarded()
            if not reserved.parts:
                return
            self._written = self._written + 1 if number is None else number
            self._queue.append(_Batch(reserved.parts, reserved.size, self._written))
            self._pending_bytes += reserved.size
            self._changed.notify_all()

    def _merge_last(self) -> None:
        # Merging only with what is not much larger costs each row a logarithmic number of copies.
        while True:
            with self._changed:
                if len(self._queue) < 2 or not self._may_merge(self._queue[-2], self._queue[-1]):
                    return
                old, new = self._queue[-2], self._queue[-1]
            merged = old.then(new)
            with self._changed:
                if len(self._queue) < 2 or self._queue[-1] is not new or (self._applying and self._queue[0] is old):
                    return
                self._queue.pop()
                self._queue[-1] = merged
                self._pending_bytes += merged.size - old.size - new.size

    def _may_merge(self, old: _Batch, new: _Batch) -> bool:
        return old.size <= 2 * new.size and old.size + new.size <= self._merge_bytes

    @property
    def applied(self) -> int:
        """The number of the last batch that `inner` has, and all before it."""
        return self._applied

    def _apply_all(self) -> None:
        while True:
            with self._changed:
                again = None if self._error is None else self._how.retry_s
                self._changed.wait_for(lambda: self._stopping or (self._queue and self._error is None), again)
                if self._stopping:
                    break
                batch = self._queue[0]
                self._applying = True
            error = self._apply(batch)
            with self._changed:
                self._applying = False
                if error is None:
                    self._queue.popleft()
                    self._pending_bytes -= batch.size
                    self._applied = batch.last
                self._error, self._told = error, False
                self._changed.notify_all()
            if error is None:
                self._call_after(batch.last)
        if self._discarding:
            # Here, because the thread that asked may be this one, in the middle of a write to `inner`.
            with contextlib.suppress(StoreError):
                self.inner.close()

    def _apply(self, batch: _Batch) -> Exception | None:
        try:
            if self._how.before is not None:
                self._how.before(batch.last)
            with self._whole:
                for chunk in batch.chunks(self._how.rows):
                    self.inner.write(chunk)
                    # Lets threads run that wait for Python's global lock.
                    time.sleep(0)
        except Exception as failure:
            return failure
        return None

    def _call_after(self, number: int) -> None:
        if self._how.after is None:
            return
        try:
            self._how.after(number)
        except Exception:
            # The rows are applied. Without this thread nothing more would be, and whoever waits would wait for ever.
            _LOG.exception("what follows batch %d failed; it is tried again after the next batch", number)

    def _raise_discarded(self) -> None:
        if self._stopping:
            raise ClosedError("the write-back row store was discarded; open it again to use it")

    def _raise_kept(self) -> None:
        if self._error is None:
            return
        self._told = True
        kind = type(self._error) if isinstance(self._error, StoreError) else StoreError
        raise kind(
            f"rows could not be written in the background: {self._error}; they are kept in memory, and flush() "
            f"writes them once the cause is gone"
        ) from self._error

    def _drain(self, *, retry: bool = False) -> None:
        with self._changed:
            if not (retry or self._told):
                self._raise_kept()
            self._error = None
            self._changed.notify_all()
            target = self._written
            self._changed.wait_for(lambda: self._stopping or self._applied >= target or self._error is not None)
            self._raise_discarded()
            self._raise_kept()

    def settle(self, *, retry: bool = False) -> None:
        """Raise a failure that is kept; one that was raised before, and with `retry` any, is tried again first."""
        if self._error is not None:
            self._drain(retry=retry)

    def scan(self, table: str, start: int = 0, window: int = 65536) -> Iterator[Rows]:
        with self._gate.call():
            self.check_scan(table, start, window)
            self._drain()
            with self._whole:
                return self.inner.scan(table, start, window)

    def flush(self) -> None:
        with self._gate.call():
            self._drain()
            self.inner.flush()

    def checkpoint(self, path: Path) -> None:
        with self._gate.call():
            self._drain()
            with self._whole:
                self.inner.checkpoint(path)

    def close(self) -> None:
        """Apply what is pending and close `inner`; where rows cannot be applied it stays open for another try."""
        with self._gate.closing() as first:
            if not first:
                return
            self._drain(retry=True)
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
            self._thread.join()
        self.inner.close()

    def discard(self) -> None:
        """Close without writing what is pending, whatever state `inner` is in. Safe in a finaliser."""
        with self._changed:
            if self._stopping:
                return
            self._stopping = self._discarding = True
            self._gate.shut()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()


__all__ = ["Applying", "Reserved", "WriteBackStore"]
