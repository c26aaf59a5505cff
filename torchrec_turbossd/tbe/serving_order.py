"""Order of the work on slots that are served, over CUDA streams, without a wait of the host."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_turbossd.cache.current_stream import CurrentStream


class ServingOrder:
    """All work comes one after the other, on whichever stream, but that a prefetch runs beside the last lookup.

    A prefetch takes slots away from rows. It comes after the account of the last lookup, and after every lookup before
    that one; whoever prefetches sees to it that slots of the last one stay. On a CPU nothing needs it.
    """

    def __init__(self, device: torch.device) -> None:
        self._current = CurrentStream(device.index or 0) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._last: torch.cuda.Stream | None = None
        self._made_on: torch.cuda.Stream | None = None
        self._ahead: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None
        self._marks: list[torch.cuda.Event] = []
        """The account of the last lookup, that lookup, and the one before it; once there are prefetches."""
        self._marked = False
        """Nothing has come since the last lookup."""

    def follow(self) -> None:
        """What this thread launches next comes after all that was launched."""
        if self._current is not None:
            with self._lock:
                self._follow(self._current())

    def _follow(self, current: torch.cuda.Stream) -> None:
        if self._last is not None and self._last is not current:
            current.wait_stream(self._last)
        self._follow_prefetch(current)
        # One stream stands for all that came before.
        self._last, self._ahead, self._marked = current, None, False

    def _follow_prefetch(self, current: torch.cuda.Stream) -> None:
        if self._ahead is not None and self._ahead[0] is not current:
            current.wait_event(self._ahead[1])

    def made_here(self) -> None:
        """Buffers that lookups use, and give to `keep` later, were made on the stream that `follow` was called on."""
        self._made_on = self._last

    def keep(self, buffers: Sequence[Tensor]) -> None:
        """Buffers that nobody needs any more are not used anew before the last lookup is over."""
        if self._last is not None and self._made_on is not self._last:
            for buffer in buffers:
                buffer.record_stream(self._last)

    def accounted(self) -> None:
        """The account of a lookup was launched; the lookup itself comes next."""
        if self._marks and self._last is not None:
            self._marks[0].record(self._last)

    def looked_up(self) -> bool:
        """It was launched; whether a prefetch may run beside it."""
        if self._marks and self._last is not None:
            account, last, before = self._marks
            self._marks = [account, before, last]
            before.record(self._last)
            self._marked = True
        return self._marked

    def unmark(self) -> None:
        """Something else than a lookup was launched last, or will be."""
        self._marked = False

    def beside(self) -> bool:
        """What this thread launches next is a prefetch; False where it comes after all that was launched instead."""
        if self._current is None:
            return False
        current = self._current()
        with self._lock:
            if not self._marks:
                self._marks = [torch.cuda.Event() for _ in range(3)]
            if not self._marked or self._last is current:
                self._follow(current)
                return False
            account, _, before = self._marks
            current.wait_event(account)
            current.wait_event(before)
            self._follow_prefetch(current)
            return True

    def prefetched(self) -> None:
        """A prefetch was launched beside the last lookup."""
        if self._current is not None:
            current, event = self._current(), torch.cuda.Event()
            event.record(current)
            with self._lock:
                self._ahead = current, event


__all__ = ["ServingOrder"]
