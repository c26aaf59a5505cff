"""Lookups, and reads of the store, that are in flight: what must wait for them, and the one lock of serving rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tbe.epochs import Epochs

_WAIT_S, _LONGEST_BREAK_S = 0.05, 0.02

Update = Mapping[int, Rows]


@contextmanager
def in_small_steps() -> Iterator[None]:
    """Work in the background, for twice as long as which lookups then have Python's global lock and the cores."""
    start = time.perf_counter()
    yield
    time.sleep(min(2 * (time.perf_counter() - start), _LONGEST_BREAK_S))


class InFlight:
    """The caller holds `lock` in every method but those that say otherwise."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)
        self._sleepers = 0
        self._lookups: Epochs[Callable[[], None]] = Epochs()
        self._reads: Epochs[Update | Callable[[], None]] = Epochs()

    @property
    def no_lookup(self) -> bool:
        """No lookup uses slots at this moment."""
        return self._lookups.idle

    def begin_lookup(self) -> int:
        """A lookup was given slots; returns what `end_lookup` wants."""
        return self._lookups.enter()

    def end_lookup(self, epoch: int) -> None:
        """It has used them. Takes the lock."""
        with self.lock:
            self._lookups.leave(epoch)
            self._after_lookups()

    def after_lookups(self, then: Callable[[], None]) -> None:
        """Call `then`, with the lock held, once the lookups in flight have ended."""
        self._lookups.retire(then)
        self._after_lookups()

    def _after_lookups(self) -> None:
        matured = self._lookups.matured()
        for then in matured:
            then()
        if matured and self._sleepers:
            self._changed.notify_all()

    def sleep(self) -> None:
        """Wait a moment, without the lock, for lookups to end."""
        self._sleepers += 1
        try:
            self._changed.wait(_WAIT_S)
        finally:
            self._sleepers -= 1

    def begin_read(self) -> int:
        """A batch begins to read the store; returns what `end_read` wants."""
        return self._reads.enter()

    def end_read(self, epoch: int) -> None:
        """It has brought up to date what it read."""
        self._reads.leave(epoch)
        self._after_reads()

    def updated(self, update: Update) -> None:
        """Rows have changed since the reads in flight began."""
        self._reads.retire(update)
        self._after_reads()

    def updates_since(self, epoch: int) -> Iterator[Update]:
        """Updates made since a read began, in order."""
        return (item for item in self._reads.since(epoch) if not callable(item))

    def after_reads(self, then: Callable[[], None]) -> None:
        """Call `then`, with the lock held, once the reads in flight have ended."""
        self._reads.retire(then)
        self._after_reads()

    def _after_reads(self) -> None:
        for item in self._reads.matured():
            if callable(item):
                item()

    def wait_for_all(self) -> None:
        """Wait until every lookup and read that is in flight now has ended. Takes the lock."""
        lookups, reads = threading.Event(), threading.Event()
        with self.lock:
            self.after_lookups(lookups.set)
            self.after_reads(reads.set)
        lookups.wait()
        reads.wait()


__all__ = ["InFlight", "Update", "in_small_steps"]
