"""Batches prefetched for training: their rows arrive in a thread of their own while the batch before computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from torchrec_turbossd.errors import CacheFullError
from torchrec_turbossd.tbe.cached_rows import Arrival, CachedRows, Distinct, Fetched
from torchrec_turbossd.tbe.layout import Batch
from torchrec_turbossd.tbe.slot_memory import TrainingMemory

_MOST_PREFETCHED = 8


class TrainingRun:
    """One batch in flight, from prefetch until its backward has ended or its graph is gone."""

    def __init__(self, batch: Batch, fetched: Fetched | None) -> None:
        self.batch, self.fetched = batch, fetched
        self.distinct: Distinct | None = None
        self.outside: TrainingMemory | None = None
        self.ended = False


class Prefetcher:
    """The prefetched batches of one TBE, oldest first. Rows of at most one of them are on their way.

    While they are, the caller may only release batches; anything else on the rows comes after `settle`.

    Args:
        end: called with each run that was never used.
    """

    def __init__(self, rows: CachedRows, device: torch.device, end: Callable[[TrainingRun], None]) -> None:
        self._rows, self._device, self._end = rows, device, end
        self._ready: deque[tuple[Tensor, int, TrainingRun]] = deque()
        self._arriving: tuple[Arrival, Future[None], TrainingRun] | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._ready)

    def start(self, indices: Tensor, offsets: Tensor) -> None:
        """Let the rows of a batch come; one that does not fit beside those in flight is left to its forward."""
        self.settle()
        batch = self._rows.layout.place(indices, offsets)
        try:
            arrival = self._rows.choose(batch)
        except CacheFullError:
            return
        run = TrainingRun(batch, None)
        if arrival.chosen:
            self._arriving = arrival, self._submit(arrival), run
        else:
            run.fetched = self._rows.settle(arrival, pin=True)
        self._ready.append((indices, _version(indices), run))
        if len(self._ready) > _MOST_PREFETCHED:
            # Nobody came for it; its pins would stay for ever.
            self._end(self._ready.popleft()[-1])

    def _submit(self, arrival: Arrival) -> Future[None]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="turbossd-prefetch")
        if self._stream is not None:
            # Slots that leave were last written by what is in this stream, or before it.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._threads.submit(_bring, self._rows, arrival, self._stream)

    def settle(self) -> None:
        """Wait until no rows are on their way."""
        if self._arriving is None:
            return
        arrival, arrived, run = self._arriving
        self._arriving = None
        try:
            arrived.result()
        except Exception:
            # Its forward brings the rows itself, and raises what still stands in the way.
            self._rows.abandon(arrival)
            self._ready = deque(entry for entry in self._ready if entry[-1] is not run)
            return
        run.fetched = self._rows.settle(arrival, pin=True)

    def take(self, indices: Tensor) -> TrainingRun | None:
        """The run of these indices; runs prefetched before it were never used and end here."""
        self.settle()
        for place, (held, version, run) in enumerate(self._ready):
            # Callers re-wrap the tensor, so memory decides; `held` keeps that memory from being used again.
            same = held.data_ptr() == indices.data_ptr() and held.shape == indices.shape and held.dtype == indices.dtype
            if same and _version(held) == version:
                for _ in range(place):
                    self._end(self._ready.popleft()[-1])
                self._ready.popleft()
                self._record(run)
                return run
        return None

    def _record(self, run: TrainingRun) -> None:
        """Slots made on the prefetch stream are used on this one until backward ends."""
        if self._stream is not None and run.fetched is not None:
            for made in (run.fetched.slots, run.fetched.at):
                if made is not None:
                    made.record_stream(torch.cuda.current_stream(self._device))

    def end_all(self) -> None:
        """Let the rows of every batch go; their forwards bring them anew."""
        self.settle()
        while self._ready:
            self._end(self._ready.popleft()[-1])

    def close(self) -> None:
        """End every batch, and the thread."""
        self.end_all()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None


def _bring(rows: CachedRows, arrival: Arrival, stream: Any) -> None:
    if stream is None:
        rows.bring(arrival)
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        rows.bring(arrival)
        # What was allocated elsewhere is in use until here.
        stream.synchronize()


def _version(indices: Tensor) -> int:
    """Rises when a tensor is written in place."""
    return 0 if indices.is_inference() else indices._version


__all__ = ["Prefetcher", "TrainingRun"]
