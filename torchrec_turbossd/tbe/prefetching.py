"""Batches prefetched for training: their rows arrive in a thread of their own while the batch before computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from torchrec_turbossd.cache.current_stream import CurrentStream
from torchrec_turbossd.errors import CacheFullError
from torchrec_turbossd.tbe.layout import Batch
from torchrec_turbossd.tbe.slot_memory import TrainingMemory
from torchrec_turbossd.tbe.table_rows import Arriving, Distinct, Fetched, TableRows

_MOST_PREFETCHED = 8


class TrainingRun:
    """One batch in flight, from prefetch until its backward has ended or its graph is gone."""

    def __init__(self, batch: Batch, fetched: Fetched | None) -> None:
        self.batch, self.fetched = batch, fetched
        self.distinct: Distinct | None = None
        self.outside: TrainingMemory | None = None
        self.ended = False


class _Waiting:
    """A prefetched batch that waits for its forward."""

    def __init__(self, indices: Tensor, offsets: Tensor, version: int, arrival: Arriving) -> None:
        # Holding the tensor keeps its memory from being used again.
        self._indices, self._offsets, self._version = indices, offsets, version
        self.arrival = arrival
        self.run = TrainingRun(arrival.batch, None)

    def is_for(self, indices: Tensor, offsets: Tensor) -> bool:
        """Whether this is the batch: the very memory of the ids, unchanged, cut up in the same way."""
        held = self._indices
        # Callers re-wrap tensors, so memory decides.
        same = held.data_ptr() == indices.data_ptr() and held.shape == indices.shape and held.dtype == indices.dtype
        if not same or _version(held) != self._version or self._offsets.shape != offsets.shape:
            return False
        # On CUDA the contents would have to be waited for.
        return offsets.device.type != "cpu" or torch.equal(self._offsets.to(offsets.dtype), offsets)


class Prefetcher:
    """The prefetched batches of one TBE, oldest first. Rows of at most one of them are on their way.

    While they are, the caller may only release batches; anything else on the rows comes after `settle`.

    Args:
        end: called with each run that was never used.
    """

    def __init__(self, rows: TableRows, device: torch.device, end: Callable[[TrainingRun], None]) -> None:
        self._rows, self._end = rows, end
        self._ready: deque[_Waiting] = deque()
        self._arriving: tuple[Future[None], _Waiting] | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._current = CurrentStream(device.index or 0)

    def __len__(self) -> int:
        return len(self._ready)

    def start(self, indices: Tensor, offsets: Tensor) -> None:
        """Let the rows of a batch come; one that does not fit beside those in flight is left to its forward."""
        self.settle()
        batch = self._rows.place(indices, offsets)
        try:
            arrival = self._rows.choose(batch)
        except CacheFullError:
            return
        waiting = _Waiting(indices, offsets, _version(indices), arrival)
        if arrival.chosen:
            self._arriving = self._submit(arrival), waiting
        else:
            waiting.run.fetched = self._rows.settle(arrival, pin=True)
        self._ready.append(waiting)
        if len(self._ready) > _MOST_PREFETCHED:
            # Nobody came for it; its pins would stay for ever.
            self._end(self._ready.popleft().run)

    def _submit(self, arrival: Arriving) -> Future[None]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="turbossd-prefetch")
        if self._stream is not None:
            # Slots that leave were last written by what is in this stream, or before it.
            self._stream.wait_stream(self._current())
        return self._threads.submit(_bring, self._rows, arrival, self._stream)

    def settle(self) -> None:
        """Wait until no rows are on their way."""
        if self._arriving is None:
            return
        arrived, waiting = self._arriving
        # An interrupt here must leave the rows on their way.
        wait([arrived])
        self._arriving = None
        arrival = waiting.arrival
        # Made on the prefetch stream, and used on this one.
        self._record(*arrival.tensors())
        try:
            arrived.result()
        except Exception:
            # Its forward brings the rows itself, and raises what still stands in the way.
            self._rows.abandon(arrival)
            self._ready = deque(each for each in self._ready if each is not waiting)
            return
        waiting.run.fetched = self._rows.settle(arrival, pin=True)

    def take(self, indices: Tensor, offsets: Tensor) -> TrainingRun | None:
        """The run of this batch; runs prefetched before it were never used and end here."""
        self.settle()
        for place, waiting in enumerate(self._ready):
            if waiting.is_for(indices, offsets):
                for _ in range(place):
                    self._end(self._ready.popleft().run)
                self._ready.popleft()
                self._rows.count(waiting.arrival)
                if waiting.run.fetched is not None:
                    # In use until backward ends.
                    self._record(waiting.run.fetched.slots)
                return waiting.run
        return None

    def _record(self, *tensors: Tensor | None) -> None:
        """Keep the memory of tensors from being used again before this stream has come past here."""
        if self._stream is not None:
            current = self._current()
            for tensor in tensors:
                if tensor is not None:
                    tensor.record_stream(current)

    def end_all(self) -> None:
        """Let the rows of every batch go; their forwards bring them anew."""
        self.settle()
        while self._ready:
            self._end(self._ready.popleft().run)

    def close(self) -> None:
        """End every batch, and the thread."""
        self.end_all()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None


def _bring(rows: TableRows, arrival: Arriving, stream: Any) -> None:
    if stream is None:
        rows.bring(arrival)
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        try:
            rows.bring(arrival)
        finally:
            # What was allocated elsewhere is in use until here.
            stream.synchronize()


def _version(indices: Tensor) -> int:
    """Rises when a tensor is written in place."""
    return 0 if indices.is_inference() else indices._version


__all__ = ["Prefetcher", "TrainingRun"]
