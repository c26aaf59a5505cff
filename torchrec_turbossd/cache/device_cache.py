"""Which rows are in which slots of a GPU, and in the DRAM tier behind them, kept on the GPU itself.

A batch costs one kernel when its rows are in slots. Those of the DRAM tier are brought in by two more, which the host
only launches; those of the row store come through places of the DRAM tier.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_turbossd.cache import entries
from torchrec_turbossd.cache.current_stream import CurrentStream
from torchrec_turbossd.cache.device_holds import HeldSlots
from torchrec_turbossd.cache.device_ops import DeviceOps
from torchrec_turbossd.cache.device_reference import TorchOps
from torchrec_turbossd.cache.device_slots import Pin
from torchrec_turbossd.cache.device_state import Batch, DeviceState
from torchrec_turbossd.cache.dram_tier import LEAST_DRAM_ROWS, DramTier
from torchrec_turbossd.cache.free_slots import FreeSlots
from torchrec_turbossd.cache.policies import DEFAULT_POLICY
from torchrec_turbossd.cache.slot_map import SlotMap
from torchrec_turbossd.errors import CacheFullError, ConfigError

Ints = NDArray[np.int64]
_MOST_RECENT = 32
_MOST_GIVEN = 65536
"""Free slots of a table that one batch is given before it is known how many it needs."""


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


class DeviceCache(HeldSlots):
    """Slots and DRAM tier of several tables. Not thread-safe: the owner holds a lock, and orders streams.

    Args:
        rows, slots: of each table; slot 0 comes on top.
        parts: for each table, the parts of a row in slots: [slots + 1, bytes] uint8 views, on one device.
        row_bytes: of each table.
        dram_slots: rows of each table that the DRAM tier keeps; None, or 0: rows only pass through it.
        changes: rows change in slots. Where they do not, and there is room for every row of a table, the tier keeps
            copies.
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
        changes: bool = True,
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
        keeps = [_keeps(n, count, changes=changes) for n, count in zip(wanted, rows, strict=True)]
        tier = DramTier(row_bytes, places, keeps, device)
        state = DeviceState(rows, slots, parts, tier, feature_table, slot_map.entries)
        super().__init__(state, _ops(state), slot_map)
        self.policy = policy
        self._feature_table = np.asarray(feature_table, dtype=np.int64)
        self._one_each = list(feature_table) == list(range(len(rows)))
        self._given: list[Tensor] = []
        self._given_versions: list[tuple[FreeSlots, int]] = []
        self._given_ahead = False
        """A batch was given them that has not told of its needs."""
        self._none = np.zeros(len(rows), dtype=np.int64)
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._chosen = torch.cuda.Event() if device.type == "cuda" else None
        self._current = CurrentStream(device.index or 0) if device.type == "cuda" else None
        self._recent: list[tuple[int, Ints]] = []
        """Lookups by table of the batches since the oldest in flight."""
        self._ends, self._lookups = b"", self._none

    def remap(
        self,
        ids: Tensor,
        offsets: Tensor,
        bags: int,
        slots: Tensor,
        *,
        mark: bool,
        safe: Tensor | None = None,
    ) -> Batch:
        """Begin a batch: launch what finds `slots` [N] int32 or int64 (written; 0 where a row is in none).

        Until `found` says that all are here, or `bring` has, or `give_up`, no other batch may begin.

        Args:
            ids, offsets: [N], N > 0, and [features * bags + 1] int32 or int64, contiguous.
            mark: the batch will change its rows.
            safe: as `offsets`, written: the same, or all 0 where those do not rise from 0 to N. None: not wanted.
        """
        self._now += 1
        if self._now >= entries.LAST_STAMP:
            self._renumber()
        touch = mark or self.own != self.rows
        # Never into `offsets`: they are the caller's, and read by programs that have not begun.
        safe = torch.empty_like(offsets) if safe is None else safe
        batch = Batch(ids, offsets, bags, safe, slots, self._now, mark, touch)
        self.again(batch)
        return batch

    def again(self, batch: Batch) -> None:
        """Remap a batch once more, as the same one: nothing counts as read twice."""
        batch.ahead = False
        self.ops.remap(batch)
        self._record(self._event)

    def _record(self, event: torch.cuda.Event | None) -> None:
        if event is not None and self._current is not None:
            event.record(self._current())

    def _renumber(self) -> None:
        """Let batches in flight, and slots, have small numbers again."""
        shift = min((pin.stamp for pin in self._active), default=self._now) - 1
        words = self.state.state
        stamps = self._stamps(words)
        stamps = torch.where(stamps == entries.HELD, stamps, (stamps - shift).clamp(min=0))
        words.copy_((stamps << entries.STAMP_SHIFT) | (words & (entries.READS | entries.DIRTY)))
        for pin in self._active:
            pin.stamp -= shift
            pin.batch.stamp = max(1, pin.batch.stamp - shift)
        self._recent = [(stamp - shift, lookups) for stamp, lookups in self._recent]
        self._now -= shift

    def found(self) -> Found:
        """Wait for what `remap` or `again` launched last, and for nothing that came after."""
        if self._event is not None:
            self._event.synchronize()
        self._take_given()
        features, report = self._feature_table.size, self.ops.report
        if (ends := report[1 + 2 * features :].tobytes()) != self._ends:
            per_feature = report[1 + 2 * features :].copy()
            per_feature[1:] -= report[1 + 2 * features : -1]
            self._ends, self._lookups = ends, self._by_table(per_feature)
        lookups = self._lookups
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
        if not self._active:
            # No batch in flight holds what came before.
            self._recent = [(self._now, lookups)]
            return
        if len(self._recent) > _MOST_RECENT:
            oldest = self.oldest
            self._recent = [(stamp, each) for stamp, each in self._recent if stamp >= oldest]
        if len(self._recent) > _MOST_RECENT:
            # One that is never ended: all since count as its last.
            self._recent = [(self._now, sum((each for _, each in self._recent), np.zeros_like(lookups)))]
        self._recent.append((self._now, lookups))

    def _has_room(self, batch: Batch, found: Found) -> bool:
        """Surely all rows of a batch can be in slots beside those of batches in flight, by what the host knows."""
        oldest = min(self.oldest, batch.stamp)
        need = found.in_dram + found.absent
        used = sum((lookups for stamp, lookups in self._recent if stamp >= oldest), need + self.held_lookups)
        return bool((used <= np.asarray(self.own)).all())

    def _check_room(self, batch: Batch, found: Found) -> None:
        """See that they can. `CacheFullError` when not: nothing has changed but that `give_up` must follow."""
        if self._has_room(batch, found):
            return
        need, slots = found.in_dram + found.absent, np.asarray(self.own)
        if bool((need <= slots - self._used_since(min(self.oldest, batch.stamp))).all()):
            return
        # Batches that came after one in flight are held with it; now they are not.
        for pin in self._active:
            pin.stamp = batch.stamp
            self.ops.restamp(pin.batch, batch.stamp)
        self._hold_all()
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

    def bring_ahead(self, batch: Batch) -> None:
        """Launch what brings in the rows that the DRAM tier has before `found` tells of them.

        Rows of batches in flight stay, whatever comes.
        """
        versions = [(free, free.version) for free in self._free]
        if versions != self._given_versions:
            # The same list as long as the same slots are free: it is looked at by what it is.
            self._given, self._given_versions = [free.peek(_MOST_GIVEN) for free in self._free], versions
        self.ops.choose(batch, self._given, min(self.oldest, batch.stamp))
        batch.ahead = self._given_ahead = True
        self._record(self._chosen)
        self.ops.exchange(batch)
        self.ops.refill(batch)

    def _take_given(self) -> None:
        """Free slots that a batch which was brought ahead has been given are free no more, as far as it needed them."""
        if self._given_ahead and not int(self.ops.report[0]) & entries.BAD_OFFSETS:
            features = self._feature_table.size
            for table, needed in enumerate(self._by_table(self.ops.report[1 : 1 + features]).tolist()):
                if needed and self._free[table]:
                    self._free[table].take(min(needed, self._given[table].numel()))
        self._given_ahead = False

    def bring(self, batch: Batch, found: Found) -> list[tuple[int, Tensor]]:
        """Bring the rows that the DRAM tier has into slots, and set those of `batch.slots` that were 0.

        Returns the rows that are in no tier, as (table, local ids ascending) on the CPU; while there are any, the host
        has waited for the device, nothing is claimed, and `batch.slots` is not set. `batch.ahead` stays where
        `bring_ahead` was enough.

        Raises:
            CacheFullError: there are too few slots.
        """
        if batch.ahead and not self._has_room(batch, found) and self._short():
            # Batches that came after one in flight are held with it; a closer look lets them go.
            self.ops.unclaim(batch)
            self.again(batch)
            found = self.found()
        if not batch.ahead:
            self._check_room(batch, found)
            if found.in_dram.any():
                self._promote(batch, found)
        if found.absent.any():
            batch.ahead = False
            return self._absent(batch)
        if not batch.ahead:
            self.ops.refill(batch)
        return []

    def _short(self) -> bool:
        """Waits to see whether rows of the batch that was brought ahead got no slot."""
        if self._chosen is not None:
            self._chosen.synchronize()
        return bool(self.ops.short.any())

    def _promote(self, batch: Batch, found: Found) -> None:
        given = [self._free[t].take(int(n)) for t, n in enumerate(found.in_dram.tolist())]
        try:
            self.ops.choose(batch, given, min(self.oldest, batch.stamp))
        except BaseException:
            for free, slots in zip(self._free, given, strict=True):
                free.give(slots)
            raise
        self.ops.exchange(batch)

    def _absent(self, batch: Batch) -> list[tuple[int, Tensor]]:
        """The rows that are in no tier, and give up the claims on all that was listed."""
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
        self._take_given()
        # It has marked slots as used, which nobody has counted; the next batch is to look at them.
        self._note(np.asarray(self.own))
        if int(self.ops.report[0]) & entries.BAD_OFFSETS:
            # Features overlap, and so do their lists.
            self.state.slot_map.bitwise_and_(~entries.CLAIMED)
        else:
            self.ops.unclaim(batch)

    def pin(self, batch: Batch) -> Pin:
        """Hold the rows of a batch in their slots until `unpin`."""
        pin = Pin(batch)
        self._active.append(pin)
        return pin

    def unpin(self, pin: Pin) -> None:
        """The batch has ended."""
        self._active.remove(pin)

    def hold(self, batch: Batch) -> None:
        """Hold a batch that `found` has just told of, and of which all rows are in slots."""
        self.hold_rows(batch, self._lookups)

    def beside(self) -> DeviceCache:
        """As `TieredSlots.beside`."""
        other = super().beside()
        other._hold_none()
        other._recent = []
        other._given, other._given_versions, other._given_ahead = [], [], False
        return other


def _keeps(dram_slots: int, rows: int, *, changes: bool) -> int:
    if dram_slots >= rows and not changes:
        return entries.KEEP_COPIES
    return entries.KEEP_ALL if dram_slots else entries.KEEP_CHANGED


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
