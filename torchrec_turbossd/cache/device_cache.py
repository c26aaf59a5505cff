"""Which rows are in which slots of a GPU, and in the DRAM tier behind them, kept on the GPU itself.

A batch costs one kernel when its rows are in slots. Those of the DRAM tier are brought in by two more, which the host
only launches; those of the row store come through places of the DRAM tier.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_turbossd.cache import entries
from torchrec_turbossd.cache.device_ops import DeviceOps
from torchrec_turbossd.cache.device_reference import TorchOps
from torchrec_turbossd.cache.device_slots import DeviceSlots, Pin
from torchrec_turbossd.cache.device_state import Batch, DeviceState
from torchrec_turbossd.cache.dram_tier import LEAST_DRAM_ROWS, DramTier
from torchrec_turbossd.cache.free_slots import FreeSlots
from torchrec_turbossd.cache.policies import DEFAULT_POLICY
from torchrec_turbossd.cache.slot_map import SlotMap, SparseSlotMap
from torchrec_turbossd.errors import CacheFullError, ConfigError

Ints = NDArray[np.int64]
_MOST_RECENT = 32
WriteBack = Callable[[int, Tensor, Tensor], None]
"""Called with a table, local ids [N] int64 and rows [N, row_bytes] uint8, on the CPU, that leave for the row store."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a remap reported.

    all_here: every row is in a slot, and nothing is wrong with the batch. flags: `BAD_OFFSETS`, `OUT_OF_BOUNDS`.
    lookups, in_dram, absent: of each table; the latter two count distinct rows that are in no slot.
    """

    all_here: bool
    flags: int
    lookups: Ints
    in_dram: Ints
    absent: Ints


class DeviceCache(DeviceSlots):
    """Slots and DRAM tier of several tables. Not thread-safe: the owner holds a lock, and orders streams.

    Args:
        rows, slots: of each table; slot 0 comes on top.
        parts: for each table, the parts of a row in slots: [slots + 1, bytes] uint8 views, on one device.
        row_bytes: of each table.
        dram_slots: rows of each table that the DRAM tier keeps; None, or 0: rows only pass through it.
        feature_table: for each feature, its table.

    Raises:
        ConfigError: a policy other than `s3_fifo`.
    """

    def __init__(
        self,
        rows: Sequence[int],
        slots: Sequence[int],
        parts: Sequence[Sequence[Tensor]],
        *,
        row_bytes: Sequence[int],
        dram_slots: Sequence[int] | None,
        feature_table: Sequence[int],
        policy: str = DEFAULT_POLICY,
    ) -> None:
        if policy != DEFAULT_POLICY:
            raise ConfigError(f"on a GPU the eviction policy is {DEFAULT_POLICY!r}, got {policy!r}; leave it out")
        device = parts[0][0].device
        wanted = [0] * len(rows) if dram_slots is None else list(dram_slots)
        places = [min(count, max(n, LEAST_DRAM_ROWS)) for count, n in zip(rows, wanted, strict=True)]
        if max(max(slots), max(places)) >= entries.DIRTY_IN_DRAM:
            raise ConfigError(
                f"on a GPU a table has fewer than {entries.DIRTY_IN_DRAM:,} slots, and as many rows in DRAM, got up to "
                f"{max(slots):,} and {max(places):,}; shard it by rows, or lower its budgets"
            )
        slot_map = SlotMap(sum(rows), device)
        self.tier = DramTier(row_bytes, places, [n > 0 for n in wanted], device)
        state = DeviceState(rows, slots, parts, self.tier, feature_table, slot_map.entries)
        super().__init__(state, _ops(state), slot_map)
        self.policy = policy
        self._feature_table = np.asarray(feature_table, dtype=np.int64)
        self._one_each = list(feature_table) == list(range(len(rows)))
        self._none = np.zeros(len(rows), dtype=np.int64)
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._recent: list[tuple[int, Ints]] = []
        """Lookups by table of the batches since the oldest in flight."""

    def remap(
        self,
        ids: Tensor,
        offsets: Tensor,
        bags: int,
        slots: Tensor,
        *,
        mark: bool,
        safe: Tensor | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> Batch:
        """Begin a batch: launch what finds `slots` [N] int32 or int64 (written; 0 where a row is in none).

        Until `found` says that all are here, or `bring` has, or `give_up`, no other batch may begin.

        Args:
            ids, offsets: [N], N > 0, and [features * bags + 1] int32 or int64, contiguous.
            mark: the batch will change its rows.
            safe: as `offsets`, written: the same but that they never lead out of the batch. None: not wanted.
            stream: the current one, where it is known.
        """
        self._now += 1
        if self._now >= entries.LAST_STAMP:
            self._renumber()
        touch = mark or self.own != self.rows
        # Never into `offsets`: they are the caller's, and read by programs that have not begun.
        safe = torch.empty_like(offsets) if safe is None else safe
        batch = Batch(ids, offsets, bags, safe, slots, self._now, mark, touch)
        self.again(batch, stream)
        return batch

    def again(self, batch: Batch, stream: torch.cuda.Stream | None = None) -> None:
        """Remap a batch once more, as the same one: nothing counts as read twice."""
        self.ops.remap(batch)
        if self._event is not None:
            self._event.record(stream or torch.cuda.current_stream(self.device.index))

    def _renumber(self) -> None:
        """Let batches in flight, and slots, have small numbers again."""
        shift = min((pin.stamp for pin in self._active), default=self._now) - 1
        words = self.state.state
        stamps = (self._stamps(words) - shift).clamp(min=0)
        words.copy_((stamps << entries.STAMP_SHIFT) | (words & (entries.READS | entries.DIRTY)))
        for pin in self._active:
            pin.stamp -= shift
        self._recent = [(stamp - shift, lookups) for stamp, lookups in self._recent]
        self._now -= shift

    def found(self) -> Found:
        """Wait for what `remap` or `again` launched last, and for nothing that came after."""
        if self._event is not None:
            self._event.synchronize()
        features, report = self._feature_table.size, self.ops.report
        per_feature = report[1 + 2 * features :].copy()
        per_feature[1:] -= report[1 + 2 * features : -1]
        lookups = self._by_table(per_feature)
        flags = int(report[0])
        if not flags & entries.BAD_OFFSETS:
            self._note(lookups)
        if not flags:
            return Found(all_here=True, flags=0, lookups=lookups, in_dram=self._none, absent=self._none)
        return Found(
            all_here=False,
            flags=flags & ~entries.MISSES,
            lookups=lookups,
            in_dram=self._by_table(report[1 : 1 + features]),
            absent=self._by_table(report[1 + features : -features]),
        )

    def _by_table(self, of_features: NDArray[np.int32]) -> Ints:
        if self._one_each:
            return of_features.astype(np.int64)
        return np.bincount(self._feature_table, weights=of_features, minlength=len(self.rows)).astype(np.int64)

    def _note(self, lookups: Ints) -> None:
        oldest = self.oldest
        if not self._active or len(self._recent) > _MOST_RECENT:
            self._recent = [(stamp, each) for stamp, each in self._recent if stamp >= oldest]
        if len(self._recent) > _MOST_RECENT:
            # One that is never ended: all since count as its last.
            self._recent = [(self._now, sum((each for _, each in self._recent), np.zeros_like(lookups)))]
        self._recent.append((self._now, lookups))

    def check_room(self, batch: Batch, found: Found) -> None:
        """See that all rows of a batch can be in slots beside those of batches in flight.

        Raises:
            CacheFullError: there are too few slots; nothing has changed but that `give_up` must follow.
        """
        oldest = min(self.oldest, batch.stamp)
        need, slots = found.in_dram + found.absent, np.asarray(self.own)
        used = sum((lookups for stamp, lookups in self._recent if stamp >= oldest), np.zeros_like(need))
        if bool((used + need <= slots).all()):
            return
        if bool((need <= slots - self._used_since(oldest)).all()):
            return
        # Batches that came after one in flight are held with it; now they are not.
        for pin in self._active:
            self._stamp(pin, batch.stamp)
        used = self._used_since(batch.stamp)
        self._recent = [(batch.stamp, used)]
        left = slots - used
        for table in np.flatnonzero(need > left).tolist():
            raise CacheFullError(
                f"{need[table]} rows of table {table} need slots, and the batch itself and those in flight leave "
                f"{left[table]} of {slots[table]}"
            )

    def _used_since(self, oldest: int) -> Ints:
        """Slots of each table that batch `oldest` or a later one used; waits for the device."""
        used = self._stamps(self.state.state) >= oldest
        bases = self.slot_base_of
        counts = [used[first + 1 : last].sum() for first, last in itertools.pairwise(bases)]
        return torch.stack(counts).cpu().numpy()

    def _stamp(self, pin: Pin, stamp: int) -> None:
        """Let the rows of a batch in flight count as used by batch `stamp`."""
        batch, pin.stamp = pin.batch, stamp
        ends = batch.offsets[:: batch.bags].tolist()
        for feature, table in enumerate(self._feature_table.tolist()):
            slots = batch.slots[ends[feature] : ends[feature + 1]].to(torch.int64)
            # 0 for a row that is still on its way.
            at = self._at(table, slots[slots > 0])
            words = self.state.state[at] & (entries.READS | entries.DIRTY)
            self.state.state[at] = words | (stamp << entries.STAMP_SHIFT)

    def promote(self, batch: Batch, found: Found) -> None:
        """Bring the rows that the DRAM tier has into slots. Rows of batches in flight stay, and those of this one.

        `check_room` has found that there are enough slots.
        """
        given = [self._free[t].take(int(n)) for t, n in enumerate(found.in_dram.tolist())]
        try:
            self.ops.choose(batch, given, min(self.oldest, batch.stamp))
        except BaseException:
            for free, slots in zip(self._free, given, strict=True):
                free.give(slots)
            raise
        self.ops.exchange(batch)

    def absent(self, batch: Batch) -> list[tuple[int, Tensor]]:
        """The rows that are in no tier, and give up the claims on all that was listed: (table, local ids, ascending).

        On the CPU; waits for the device.
        """
        listed = self.ops.absent(batch)
        by_table: list[list[Tensor]] = [[] for _ in self.rows]
        for feature, ids in enumerate(listed):
            if ids.numel():
                by_table[int(self._feature_table[feature])].append(ids)
        ids_of = [(table, torch.cat(ids).cpu().sort().values) for table, ids in enumerate(by_table) if ids]
        self.ops.unclaim(batch)
        return ids_of

    def give_up(self, batch: Batch) -> None:
        """End a batch whose rows were not all brought in."""
        if self._event is not None:
            self._event.synchronize()
        if int(self.ops.report[0]) & entries.BAD_OFFSETS:
            # Features overlap, and so do their lists.
            self.state.slot_map.bitwise_and_(~entries.CLAIMED)
        else:
            self.ops.unclaim(batch)

    def refill(self, batch: Batch) -> None:
        """Set those of `batch.slots` that were 0, now that all of its rows are in slots."""
        self.ops.refill(batch)

    def put(self, table: int, ids: Tensor, rows: Tensor, write_back: WriteBack) -> int:
        """Put rows from the store into the DRAM tier: as many of the first as there are places; returns how many.

        Waits for the device. What leaves the tier and is not in the store is written back first; if that raises,
        nothing has changed.

        Args:
            ids: [N] int64, distinct, in no tier. rows: [N, row_bytes] uint8. Both on the CPU.
        """
        self.synchronize()
        places, gone, held = self.tier.make_room(table, ids.numel())
        dirty = self.tier.is_dirty(table, held)
        if bool(dirty.any()):
            write_back(table, gone[dirty], self.tier.read(table, held[dirty]))
        count, base = places.numel(), self.base_of[table]
        entry = (places | entries.IN_DRAM).to(torch.int32).to(self.device)
        leave, come = (gone + base).to(self.device), (ids[:count] + base).to(self.device)
        self.map.clear(leave)
        self.tier.release(table, held)
        self.tier.admit(table, places, ids[:count], rows[:count])
        self.map.set(come, entry)
        return count

    def synchronize(self) -> None:
        """Wait until no kernel of the current stream uses the DRAM tier."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def pin(self, batch: Batch) -> Pin:
        """Hold the rows of a batch in their slots until `unpin`."""
        pin = Pin(batch)
        self._active.append(pin)
        return pin

    def unpin(self, pin: Pin) -> None:
        """The batch has ended."""
        self._active.remove(pin)

    def in_dram(self, table: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which of local `ids` [N] are in the DRAM tier, and where: ([N] bool, [M] int64), on the CPU; waits."""
        entry = self.entries_of(table, ids.to(self.device)).cpu()
        self.synchronize()
        there = entry < 0
        return there, (entry[there] & entries.PLACE).to(torch.int64)

    def mark_in_dram(self, table: int, ids: Tensor, places: Tensor, *, dirty: bool) -> None:
        """Rows of local `ids` [N] at `places` [N] of the DRAM tier differ from the store's, or do not. On the CPU."""
        self.tier.mark(table, places, dirty=dirty)
        entry = (places | entries.IN_DRAM | (entries.DIRTY_IN_DRAM if dirty else 0)).to(torch.int32)
        self.map.set((ids + self.base_of[table]).to(self.device), entry.to(self.device))

    def forget(self) -> None:
        """Every row is absent; no batch is in flight."""
        self.synchronize()
        self.state.slot_map.zero_()
        self.state.reset_slots()
        self.ops.locate()
        self.tier.clear()
        self._free = [FreeSlots(1, n, self.device) for n in self.slots]
        self.own = list(self.slots)

    def beside(self) -> DeviceCache:
        """An empty cache of the same tables over the same slots, which has none of them: for `give` and `replace`."""
        other = DeviceCache.__new__(DeviceCache)
        other.__dict__.update(self.__dict__)
        other.state = self.state.beside()
        other.ops = TorchOps(other.state)
        # A second dense map would be allocated whole.
        other.map = SparseSlotMap(self.device)
        other._free = [FreeSlots(n + 1, n, self.device) for n in self.slots]
        other._active, other._recent, other.own = [], [], [0] * len(self.slots)
        return other

    def replace(self, other: DeviceCache) -> None:
        """Take the place of a cache that this one was made `beside`: the slot map is its now, the DRAM tier empty."""
        if isinstance(self.map, SlotMap) or isinstance(other.map, SparseSlotMap):
            return
        self.synchronize()
        self.tier.clear()
        theirs = [self._placed(other, table) for table in range(len(self.slots))]
        ours = [self._placed(self, table) for table in range(len(self.slots))]
        dense, sparse = other.map, SparseSlotMap(self.device)
        other.state.slot_map.zero_()
        for ids, slots in theirs:
            sparse.set(ids, slots)
        for ids, slots in ours:
            dense.set(ids, slots)
        self.map, other.map = dense, sparse
        self.state.slot_map = other.state.slot_map
        self.ops, other.ops = other.ops, self.ops
        self.ops.state, other.ops.state = self.state, other.state
        self.ops.locate()
        self._now = max(self._now, other._now)

    @staticmethod
    def _placed(cache: DeviceSlots, table: int) -> tuple[Tensor, Tensor]:
        ids, slots = cache.resident(table)
        return ids + cache.base_of[table], slots

    def check(self, away: Sequence[Tensor] | None = None) -> None:
        """`DeviceSlots.check`, and that the slot map and the DRAM tier agree."""
        super().check(away)
        self.synchronize()
        count = 0
        for table in range(len(self.rows)):
            ids, places = self.tier.resident(table)
            there, at = self.in_dram(table, ids)
            count += ids.numel()
            if not bool(there.all()) or not torch.equal(at, places):
                raise RuntimeError(f"cache invariant broken in table {table}: the slot map and the DRAM tier agree")
        if isinstance(self.map, SlotMap) and int((self.state.slot_map < 0).sum()) != count:
            raise RuntimeError("cache invariant broken: each entry of the DRAM tier belongs to a row in it")


def _ops(state: DeviceState) -> DeviceOps:
    """Triton kernels on a GPU that has Triton (it comes with PyTorch's builds for GPUs), else PyTorch operators."""
    if state.device.type != "cpu":
        try:
            from torchrec_turbossd.cache.device_triton import TritonOps
        except ImportError:
            return TorchOps(state)
        return TritonOps(state)
    return TorchOps(state)


__all__ = ["DeviceCache", "Found"]
