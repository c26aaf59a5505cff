"""What the kernels of a device-resident cache do, in PyTorch operators: to compare with, and where Triton is not."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_turbossd.cache import entries
from torchrec_turbossd.cache.device_ops import DeviceOps, Given
from torchrec_turbossd.cache.device_state import Batch, DeviceState


class TorchOps(DeviceOps):
    """The operations, one feature or table after the other, with a wait for the device wherever one is due."""

    def __init__(self, state: DeviceState) -> None:
        super().__init__(state)
        self._listed: list[tuple[Tensor, Tensor]] = []
        self._chosen: list[Tensor] = []

    def remap(self, batch: Batch) -> None:
        state, features = self.state, len(self.state.feature_table)
        ends = batch.offsets[:: batch.bags].to(torch.int64).clamp(0, batch.ids.numel()).tolist()
        flags = entries.BAD_OFFSETS * self._falls(batch)
        batch.safe.copy_(batch.offsets)
        self._listed = []
        for feature, table in enumerate(state.feature_table):
            start, stop = ends[feature], max(ends[feature], ends[feature + 1])
            rows = batch.ids[start:stop].to(torch.int64)
            known = (rows >= 0) & (rows < state.rows[table])
            flags |= 0 if bool(known.all()) else entries.OUT_OF_BOUNDS
            rows = torch.where(known, rows, 0)
            entry = state.slot_map[rows + state.base_of[table]]
            here = (entry > 0) & (entry < entries.CLAIMED)
            batch.slots[start:stop] = torch.where(here, entry, 0)
            self._touch(table, entry[here], batch)
            flags |= 0 if bool(here.all()) else entries.MISSES
            self._listed.append(self._claim(table, rows[~here]))
        if flags & entries.BAD_OFFSETS:
            batch.slots.zero_()
            batch.safe.zero_()
        self.report[0] = flags
        for feature, (low, high) in enumerate(self._listed):
            self.report[1 + feature], self.report[1 + features + feature] = low.numel(), high.numel()
        self.report[1 + 2 * features :] = batch.offsets[batch.bags :: batch.bags].cpu()

    @staticmethod
    def _falls(batch: Batch) -> bool:
        offsets = batch.offsets
        falls = bool((offsets[1:] < offsets[:-1]).any())
        return falls or int(offsets[0]) != 0 or int(offsets[-1]) != batch.ids.numel()

    def _touch(self, table: int, slots: Tensor, batch: Batch) -> None:
        state = self.state
        if not batch.touch:
            return
        at = slots.to(torch.int64) + state.slot_base_of[table]
        old = state.state[at]
        reads = ((old & entries.READS) + 1).clamp(max=entries.READS)
        new = (batch.stamp << entries.STAMP_SHIFT) | (old & entries.DIRTY) | reads
        new = torch.where((old >> entries.STAMP_SHIFT) >= batch.stamp, old, new)
        state.state[at] = new | entries.DIRTY if batch.mark else new

    def _claim(self, table: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.unique(rows)
        entry = self.state.slot_map[rows + self.state.base_of[table]]
        mine = (entry & entries.CLAIMED) == 0
        rows, entry = rows[mine], entry[mine]
        self.state.slot_map[rows + self.state.base_of[table]] = entry | entries.CLAIMED
        return rows[entry < 0], rows[entry == 0]

    def absent(self, batch: Batch) -> list[Tensor]:
        return [high for _, high in self._listed]

    def choose(self, batch: Batch, given: Given, oldest: int) -> None:
        if int(self.report[0]) & entries.BAD_OFFSETS:
            none = torch.empty(0, dtype=torch.int64, device=self.state.device)
            self._chosen = [none for _ in self._listed]
            return
        self.short[:] = 0
        free = [each.clone() for each in given]
        self._chosen = []
        for feature, table in enumerate(self.state.feature_table):
            wanted = self._listed[feature][0]
            found = [free[table][: wanted.numel()]]
            free[table] = free[table][wanted.numel() :]
            found.append(self.empty(table, wanted.numel() - found[0].numel(), oldest))
            slots = torch.cat(found)
            self.short[table] += wanted.numel() - slots.numel()
            self.enqueue(table, slots, wanted[: slots.numel()])
            # Another feature of the table must not empty it again.
            at = slots + self.state.slot_base_of[table]
            self.state.state[at] = (batch.stamp << entries.STAMP_SHIFT) | (self.state.state[at] & entries.DIRTY)
            self._chosen.append(slots)

    def exchange(self, batch: Batch) -> None:
        for feature, table in enumerate(self.state.feature_table):
            slots = self._chosen[feature]
            self._swap(table, self._listed[feature][0][: slots.numel()], slots, batch)

    def _swap(self, table: int, rows: Tensor, slots: Tensor, batch: Batch) -> None:
        state, tier = self.state, self.state.tier
        at, base = slots + state.slot_base_of[table], state.base_of[table]
        entry = state.slot_map[rows + base]
        places = (entry & entries.PLACE).to(torch.int64)
        owner, word = state.owners[at], state.state[at]
        leaves, dirty = owner >= 0, (word & entries.DIRTY) > 0
        out = leaves & (dirty | (tier.keeps[table] == entries.KEEP_ALL))
        copied = leaves & tier.copies(table)
        back, dirty = torch.where(copied, owner, places), dirty & ~copied
        there, offset = tier.tables[table], 0
        for part in state.parts[table]:
            goes = part[slots].cpu()
            part[slots] = there[places.cpu(), offset : offset + part.shape[1]].to(part.device)
            there[back[out].cpu(), offset : offset + part.shape[1]] = goes[out.cpu()]
            offset += part.shape[1]
        said = owner | entries.HEADER_FRESH | torch.where(dirty, entries.HEADER_DIRTY, 0)
        said = torch.where(out, said, entries.FREE).cpu()
        header = tier.header_at[table]
        told = out.cpu() if tier.copies(table) else slice(None)
        there[back.cpu()[told], header : header + entries.HEADER_BYTES] = said[told][:, None].view(torch.uint8)
        now = entries.IN_DRAM | torch.where(dirty, entries.DIRTY_IN_DRAM, 0) | back.to(torch.int32)
        state.slot_map[(owner + base)[leaves]] = torch.where(out | copied, now, 0)[leaves].to(torch.int32)
        state.slot_map[rows + base] = slots.to(torch.int32)
        state.owners[at] = rows
        kept = torch.where((entry & entries.DIRTY_IN_DRAM) > 0, entries.DIRTY, 0) | (entries.DIRTY if batch.mark else 0)
        state.state[at] = ((batch.stamp << entries.STAMP_SHIFT) | kept).to(torch.int32)

    def refill(self, batch: Batch) -> None:
        state = self.state
        ends = batch.offsets[:: batch.bags].tolist()
        for feature, table in enumerate(state.feature_table):
            part = slice(ends[feature], ends[feature + 1])
            rows = batch.ids[part].to(torch.int64)
            rows = torch.where((rows >= 0) & (rows < state.rows[table]), rows, 0)
            entry = state.slot_map[rows + state.base_of[table]]
            found = torch.where(entry < entries.CLAIMED, entry.clamp(min=0), 0).to(batch.slots.dtype)
            batch.slots[part] = torch.where(batch.slots[part] == 0, found, batch.slots[part])

    def restamp(self, batch: Batch, stamp: int) -> None:
        state, ends = self.state, batch.safe[:: batch.bags].tolist()
        for feature, table in enumerate(state.feature_table):
            slots = batch.slots[ends[feature] : ends[feature + 1]].to(torch.int64)
            at = slots[slots > 0] + state.slot_base_of[table]
            words = state.state[at] & (entries.READS | entries.DIRTY)
            state.state[at] = words | (stamp << entries.STAMP_SHIFT)

    def unclaim(self, batch: Batch) -> None:
        for table, listed in zip(self.state.feature_table, self._listed, strict=True):
            at = torch.cat(listed) + self.state.base_of[table]
            entry = self.state.slot_map[at]
            claimed = (entry < 0) | (entry >= entries.CLAIMED)
            self.state.slot_map[at[claimed]] = entry[claimed] & ~entries.CLAIMED


__all__ = ["TorchOps"]
