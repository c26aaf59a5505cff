"""The operations of a device-resident cache as Triton kernels, without a wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from torchrec_turbossd.cache import kernels, kernels_rows
from torchrec_turbossd.cache.current_stream import CurrentStream
from torchrec_turbossd.cache.device_ops import DeviceOps, Given
from torchrec_turbossd.cache.device_state import Batch, DeviceState

_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_PROGRAMS = 4096
"""Programs of one kernel, roughly: enough to fill a GPU, few enough to start quickly."""


class TritonOps(DeviceOps):
    """One launch each. Scratch memory grows with the largest batch: 12 bytes a lookup."""

    def __init__(self, state: DeviceState) -> None:
        super().__init__(state)
        features, device = len(state.feature_table), state.device
        self._counts = torch.zeros(1 + 2 * features, dtype=torch.int32, device=device)
        self._published = torch.zeros_like(self._counts)
        self._done = torch.zeros(1, dtype=torch.int32, device=device)
        self._no_slots = torch.zeros(1, dtype=torch.int64, device=device)
        self._none_given = torch.zeros(len(state.rows) + 1, dtype=torch.int32, device=device)
        self._compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        self._index = device.index or 0 if device.type == "cuda" else None
        self._current = None if self._index is None else CurrentStream(self._index)
        self._parts = max(len(each) for each in state.parts)
        self._most = 0
        self._last_given: Given | None = None
        self._slots, self._first = self._no_slots, self._none_given
        self._reserve(1)

    def _reserve(self, lookups: int) -> None:
        """Scratch memory for so many lookups; nothing that was launched uses what was there."""
        device = self.state.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        missing = torch.empty(lookups, dtype=torch.int64, device=device)
        chosen = torch.empty(lookups, dtype=torch.int32, device=device)
        self._at = self._located(missing, chosen)
        self._missing, self._chosen = missing, chosen

    def locate(self) -> None:
        self._at = self._located(self._missing, self._chosen)

    def _located(self, missing: Tensor, chosen: Tensor) -> Tensor:
        state = self.state
        everything = (
            state.slot_map,
            state.state,
            missing,
            chosen,
            state.owners,
            state.rings,
            state.queues,
            state.ghosts,
            state.tables,
            state.part_fields,
            state.features,
            state.feature_first,
            state.feature_list,
            self._counts,
            self._published,
            self._report,
            self._done,
        )
        return torch.tensor([each.data_ptr() for each in everything], dtype=torch.int64).to(state.device)

    def _launch(self, kernel: Any, grid: tuple[int, int], args: tuple[Any, ...], **constants: Any) -> None:
        """Launch a kernel; after the first time past Triton's look at every argument, which takes longer than it runs.

        The arguments of one kernel always have the same types, but for the ids, offsets and slots of a batch.
        """
        if self._index is not None and torch.cuda.current_device() != self._index:
            # Triton launches on the current device, whosever the tensors are.
            with torch.cuda.device(self._index):
                self._launch(kernel, grid, args, **constants)
            return
        key = (kernel.__name__, *[each.dtype for each in args if isinstance(each, Tensor)], *constants.values())
        compiled, values = self._compiled.get(key, (None, ()))
        if compiled is None or self._current is None:
            # None where it is interpreted.
            values = tuple(value for name, value in constants.items() if name != "num_warps")
            self._compiled[key] = kernel[grid](self._at, *args, **constants), values
            return
        compiled[(*grid, 1)](self._at, *args, *values, stream=self._current.handle())

    def _grid(self, lookups: int, block: int) -> tuple[int, int]:
        features = len(self.state.feature_table)
        # Features may differ in lookups; programs without work cost little, and those with much loop.
        return max(1, min(-(-lookups // block), _PROGRAMS // features, -(-2 * lookups // (block * features)))), features

    def remap(self, batch: Batch) -> None:
        lookups = batch.ids.numel()
        if lookups > self._missing.numel():
            self._reserve(lookups)
        args = batch.ids, batch.offsets, batch.safe, batch.slots, lookups, batch.bags, batch.stamp
        self._over_lookups(kernels.remap, lookups, args, TOUCH=batch.touch, MARK=batch.mark)

    def _over_lookups(self, kernel: Any, lookups: int, args: tuple[Any, ...], **constants: Any) -> None:
        block, warps = kernels.BLOCK, kernels.WARPS
        self._launch(kernel, self._grid(lookups, block), args, **constants, BLOCK=block, num_warps=warps)

    def absent(self, batch: Batch) -> list[Tensor]:
        features = len(self.state.feature_table)
        counts = self.report[1 + features : 1 + 2 * features].tolist()
        ends = self.report[1 + 2 * features :].tolist()
        return [self._missing[end - count : end] for end, count in zip(ends, counts, strict=True)]

    def choose(self, batch: Batch, given: Given, oldest: int) -> None:
        state = self.state
        if given is not self._last_given:
            self._last_given, self._slots, self._first = given, self._no_slots, self._none_given
            if any(each.numel() for each in given):
                self._slots, self._first = torch.cat(list(given)), _starts(given, state.device)
        slots, first = self._slots, self._first
        if slots is not self._no_slots and self._current is not None:
            # They may have been made for a batch on another stream.
            for each in (slots, first):
                each.record_stream(self._current())
        self._launch(
            kernels_rows.choose,
            (len(state.rows), 1),
            (slots, first, batch.offsets, batch.ids.numel(), batch.bags, oldest),
            BLOCK=kernels_rows.QUEUE_BLOCK,
            num_warps=kernels_rows.QUEUE_WARPS,
        )

    def exchange(self, batch: Batch) -> None:
        state, features = self.state, len(self.state.feature_table)
        # The report may be another batch's as yet, and not a like one's; whoever there is does it all.
        self._most = max(int(self.report[1 : 1 + features].max()), self._most - self._most // 16)
        groups = max(1, min(-(-self._most // kernels_rows.EXCHANGE_ROWS), 8 * _PROGRAMS // features))
        self._launch(
            kernels_rows.exchange,
            (groups, features),
            (batch.offsets, batch.ids.numel(), batch.bags, batch.stamp),
            MARK=batch.mark,
            PARTS=self._parts,
            WORD=_WORDS[state.word_bytes],
            ROWS=kernels_rows.EXCHANGE_ROWS,
            COLS=kernels_rows.EXCHANGE_WORDS,
            num_warps=kernels_rows.EXCHANGE_WARPS,
        )

    def refill(self, batch: Batch) -> None:
        lookups = batch.ids.numel()
        args = batch.ids, batch.offsets, batch.slots, lookups, batch.bags
        self._over_lookups(kernels.refill, lookups, args)

    def restamp(self, batch: Batch, stamp: int) -> None:
        lookups = batch.ids.numel()
        # Not the caller's offsets, which may be another batch's by now.
        args = batch.safe, batch.slots, lookups, batch.bags, stamp
        self._over_lookups(kernels.restamp, lookups, args)

    def unclaim(self, batch: Batch) -> None:
        lookups = batch.ids.numel()
        args = batch.offsets, lookups, batch.bags
        self._over_lookups(kernels.unclaim, lookups, args)


def _starts(given: Sequence[Tensor], device: torch.device) -> Tensor:
    counts: list[Any] = [0, *(each.numel() for each in given)]
    return torch.tensor(counts, dtype=torch.int32).cumsum(0).to(torch.int32).to(device)


__all__ = ["TritonOps"]
