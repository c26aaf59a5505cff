"""Rows of a serving TBE brought into slots of a GPU, which keeps account of them itself, for lookups.

The lock is held while a batch is launched, from its remap to its lookup, so that on the device batches, updates and
exchanges of versions come one after the other. It is not held while the store is read.
"""

from __future__ import annotations

import contextlib
import enum
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from torchrec_turbossd.cache.device_cache import DeviceCache, Found
from torchrec_turbossd.cache.device_state import Batch as Work
from torchrec_turbossd.errors import CacheFullError
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.layout import Bounds, UnplacedBatch
from torchrec_turbossd.tbe.served import Served, UpdatableStore
from torchrec_turbossd.tbe.served_rows import Reader, ServedRows
from torchrec_turbossd.tbe.serving_order import ServingOrder
from torchrec_turbossd.tbe.slot_memory import SlotMemory

_TURN_S = 0.02
Made = TypeVar("Made")
Run = Callable[[Tensor, Tensor], Tensor]
Wanted = list[tuple[int, Tensor]]
Buffers = tuple[Tensor, Tensor]
"""Slots [N] and offsets, both int32 or both int64."""


class Use(enum.Enum):
    """What a batch is brought into slots for."""

    LOOKUP, AHEAD, HOLD = range(3)


class DeviceLookupRows(ServedRows):
    """As `ServedRows`, as far as lookups need it, with slots and DRAM tier on a GPU."""

    def __init__(
        self,
        shards: Sequence[TableShard],
        feature_table: Sequence[int],
        memory: SlotMemory,
        store: UpdatableStore,
        cache: DeviceCache,
        bounds: Bounds = Bounds.RAISE,
    ) -> None:
        super().__init__(shards, feature_table, memory, store, cache, bounds)
        self.order = ServingOrder(self.device)
        self._hits = dict.fromkeys(Use, False)
        """The last batch of its kind found all of its rows in slots, and so may the next."""
        self.looked_up: Work | None = None
        self._dropped: deque[Hold] = deque()
        self._kept = torch.empty(0, device=self.device), torch.empty(0, device=self.device)
        # Slots were just made, on the stream of whoever made them.
        self.order.follow()

    @contextmanager
    def alone_on_stream(self) -> Iterator[None]:
        with self.lock, self.on_stream():
            yield

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """The caller holds the lock."""
        self.order.follow()
        self._release_dropped()
        yield

    def place(self, indices: Tensor, offsets: Tensor) -> UnplacedBatch:
        """Check a batch as far as that needs no look at what it holds; raises as `Layout.place`."""
        return UnplacedBatch(self.layout, indices, offsets, self.layout.check_form(indices, offsets))

    def look_up(self, batch: UnplacedBatch, slot_type: torch.dtype, run: Run) -> Tensor:
        """What `run` makes of the slots of a batch and its offsets, both of `slot_type`, with all of its rows in slots.

        `run` is launched before it is known what this batch misses: without anything brought in where the last one
        missed nothing, else after what brings in rows of the DRAM tier. If that was not enough, what came of it is
        thrown away. The host waits for what is before both on the device, not for them.

        Raises:
            InputError, RowIndexError: as `Layout.place`.
            CacheFullError: there are too few slots; the batch can then run on `take_out`.
        """
        if not batch.lookups_and_bags:
            batch.place()
            return run(batch.indices.to(slot_type), batch.offsets.to(slot_type))
        return self._serve(
            batch, lambda: self._workspace(batch, slot_type), Use.LOOKUP, lambda work: self._launch(work, run)
        )

    def prefetch(self, batch: UnplacedBatch) -> None:
        """Bring the rows of a batch into slots, where they stay until others need these more.

        On a CUDA stream of its own it runs beside the last lookup. A batch that does not fit is left alone.

        Raises:
            InputError, RowIndexError: as `Layout.place`.
        """
        if not batch.lookups_and_bags:
            batch.place()
            return
        batch.keep_for_current_stream()
        into = self._buffers(batch, torch.int32)
        with contextlib.suppress(CacheFullError):
            self._serve(batch, lambda: into, Use.AHEAD, lambda work: None)

    def hold(self, batch: UnplacedBatch, into: Buffers) -> Hold:
        """Bring the rows of a batch into slots, where they stay until they are released.

        Args:
            into: is written.

        Raises:
            InputError, RowIndexError: as `Layout.place`.
            CacheFullError: there are too few slots.
        """

        def held(work: Work) -> Hold:
            self.cache.hold(work)
            return Hold(self.served, self.cache, work)

        return self._serve(batch, lambda: into, Use.HOLD, held)

    def release(self, hold: Hold) -> None:
        """The rows of a batch that was held may leave, after all that was launched."""
        with self.alone_on_stream():
            hold.let_go()

    def release_later(self, hold: Hold) -> None:
        """The same with the next batch: takes no lock, so that it may be called from anywhere."""
        self._dropped.append(hold)

    def _release_dropped(self) -> None:
        while self._dropped:
            self._dropped.popleft().let_go()

    def _workspace(self, batch: UnplacedBatch, slot_type: torch.dtype) -> Buffers:
        """Buffers of lookups, which come one after the other: the last one's, where they are as large."""
        slots, safe = self._kept
        if slots.shape != batch.indices.shape or safe.shape != batch.offsets.shape or slots.dtype != slot_type:
            # The last lookup may use them still, on another stream than they were made on.
            self.order.keep(self._kept)
            self._kept = self._buffers(batch, slot_type)
            self.order.made_here()
        return self._kept

    def _buffers(self, batch: UnplacedBatch, slot_type: torch.dtype) -> Buffers:
        # They outlive a caller's inference mode.
        with torch.inference_mode(False):
            slots = torch.empty(batch.indices.numel(), dtype=slot_type, device=self.device)
            return slots, torch.empty(batch.offsets.numel(), dtype=slot_type, device=self.device)

    def _launch(self, work: Work, run: Run) -> Tensor:
        self.order.accounted()
        out = run(work.slots, work.safe)
        self.looked_up = work if self.order.looked_up() else None
        return out

    def _serve(self, batch: UnplacedBatch, into: Callable[[], Buffers], use: Use, then: Callable[[Work], Made]) -> Made:
        """What `then` makes of a batch once all of its rows are in slots; for a lookup it may be asked before."""
        with _Moment(self, use):
            work = self._remap(batch, into())
            try:
                if not self._hits[use]:
                    self.cache.bring_ahead(work)
                early = then(work) if use is Use.LOOKUP else None
                found = self.cache.found()
                self._hits[use] = found.all_here
                wanted = [] if found.all_here else self._bring_from_dram(batch, work, found)
                if not (found.all_here or work.ahead):
                    # What was launched since the lookup is account again.
                    self.order.unmark()
            except BaseException:
                self._give_up(work)
                raise
            if not wanted:
                self._count(batch, found, use)
                return early if early is not None and (found.all_here or work.ahead) else then(work)
            reader = self._begin_reading()
        try:
            # Threads that hand Python's global lock to and fro get less done than one after the other.
            my_turn = self._turn.acquire(timeout=_TURN_S)
            try:
                return self._with_reads(batch, into, (reader, wanted), found, use, then)
            finally:
                if my_turn:
                    self._turn.release()
        finally:
            self._end_reading(reader)

    def _give_up(self, work: Work) -> None:
        self.order.unmark()
        self.cache.give_up(work)

    def _remap(self, batch: UnplacedBatch, into: Buffers) -> Work:
        slots, safe = into
        work: Work = self.cache.remap(batch.indices, batch.offsets, batch.bags, slots, mark=False, safe=safe)
        return work

    def _count(self, batch: UnplacedBatch, found: Found, use: Use) -> None:
        if use is not Use.AHEAD:
            self.counters.add(found.lookups, found.in_dram + found.absent, found.in_dram)
            self.recorder.add(batch)

    def _bring_from_dram(self, batch: UnplacedBatch, work: Work, found: Found) -> Wanted:
        """Bring in what the DRAM tier has; returns what is in no tier."""
        if found.flags:
            batch.place()
        wanted: Wanted = self.cache.bring(work, found)
        return wanted

    def _with_reads(
        self,
        batch: UnplacedBatch,
        into: Callable[[], Buffers],
        begun: tuple[Reader, Wanted],
        found: Found,
        use: Use,
        then: Callable[[Work], Made],
    ) -> Made:
        """Read what is wanted from the store, without the lock, until a moment comes at which nothing is."""
        reader, wanted = begun
        while True:
            self._read(reader, self._by_place(wanted))
            with _Moment(self, use):
                self._catch_up(reader)
                work = self._remap(batch, into())
                try:
                    wanted = self._bring_all(batch, work, reader)
                except BaseException:
                    self._give_up(work)
                    raise
                if not wanted:
                    self._count(batch, found, use)
                    return then(work)
                wanted = [(t, ids) for t, ids in enumerate(reader.read.lacks(self._by_place(wanted))) if ids.numel()]

    def _bring_all(self, batch: UnplacedBatch, work: Work, reader: Reader) -> Wanted:
        """Bring in what the DRAM tier has and what was read; returns what is wanted still, if something is unread."""
        wanted = self._bring_from_dram(batch, work, self.cache.found())
        while wanted and not any(ids.numel() for ids in reader.read.lacks(self._by_place(wanted))):
            for table, ids in wanted:
                # Not more at once than pass through the tier.
                part = ids[: self.cache.tier.places[table]]
                self.cache.put(table, part, reader.read.rows(table, part), _nothing_to_write)
            self.cache.again(work)
            wanted = self._bring_from_dram(batch, work, self.cache.found())
        return wanted

    def _by_place(self, wanted: Wanted) -> list[Tensor]:
        by_table = dict(wanted)
        return [by_table.get(t, torch.empty(0, dtype=torch.int64)) for t in range(len(self.shards))]


class Hold:
    """Rows of a batch that stay in their slots: those of one version. Whoever has it holds the rows' lock."""

    def __init__(self, served: Served, cache: DeviceCache, work: Work) -> None:
        self._served, self._cache, self._work = served, cache, work

    @property
    def spoilt(self) -> bool:
        """A row that the batch may have could not be kept up to date."""
        return self._work.spoilt

    def let_go(self) -> None:
        """The rows may leave."""
        self._cache.let_go(self._work)
        self._served.pass_on()


class _Moment:
    """Where a batch may be launched; a context manager without the cost of a generator."""

    __slots__ = ("_beside", "_pin", "_rows", "_use")

    def __init__(self, rows: DeviceLookupRows, use: Use) -> None:
        self._rows, self._use = rows, use
        self._beside, self._pin = False, None

    def __enter__(self) -> None:
        rows = self._rows
        rows.lock.acquire()
        try:
            if self._use is not Use.AHEAD:
                rows.order.follow()
                rows._release_dropped()
                return
            self._beside = rows.order.beside()
            if self._beside and rows.looked_up is not None:
                self._pin = rows.cache.pin(rows.looked_up)
        except BaseException:
            rows.lock.release()
            raise

    def __exit__(self, *exc: object) -> None:
        rows = self._rows
        try:
            if self._pin is not None:
                rows.cache.unpin(self._pin)
            if self._beside:
                rows.order.prefetched()
        finally:
            rows.lock.release()


def _nothing_to_write(table: int, ids: Tensor, rows: Tensor) -> None:
    """Rows that are served are never newer than the store's."""


__all__ = ["DeviceLookupRows", "Hold"]
