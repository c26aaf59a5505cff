"""Work that every rank does, or one for all, and that succeeds or fails on all of them together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from torchrec_turbossd.errors import SnapshotError

_Result = TypeVar("_Result")
HEARTBEAT_S = 5.0
"""How often ranks tell each other that they still work: far less than the time-out of any collective."""


def everywhere(group: ProcessGroup | None, work: Callable[[], _Result]) -> list[_Result]:
    """Run `work`, which calls no collective, on every rank; every rank gets all results, or raises when one failed.

    It may take longer than the group's time-out, and on one rank longer than on another: meanwhile the ranks exchange
    heartbeats. When another rank has ended or hangs, this raises what the group does (over gloo at once where a process
    has ended, else after the group's time-out), once `work` has ended here, so that the caller can clean up behind it.
    """
    worker = _Worker(work)
    try:
        while not _all_done(group, worker.wait(HEARTBEAT_S)):
            pass
    except Exception:
        worker.wait(None)
        raise
    failure = worker.failure
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (worker.result, repr(failure) if failure else None), group=group)
    if failure is not None:
        raise failure
    for rank, (_, said) in enumerate(gathered):
        if said is not None:
            raise SnapshotError(f"rank {rank} failed: {said}")
    return [found for found, _ in gathered]


def together(group: ProcessGroup | None, work: Callable[[], _Result], *, only: int) -> _Result:
    """Run `work` on rank `only`; every rank gets its result, or raises when it failed."""
    mine = dist.get_rank(group) == only
    return everywhere(group, lambda: work() if mine else None)[only]  # type: ignore[return-value]


def _all_done(group: ProcessGroup | None, mine: bool) -> bool:
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, mine, group=group)
    return all(gathered)


class _Worker:
    """A call in a thread of its own, on the caller's CUDA device."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.failure: BaseException | None = None
        self._work = work
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        if self._device is not None:
            # The thread has a stream of its own, which would not wait for the caller's.
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._run, name="turbossd-collective", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            self.result = self._work()
        except BaseException as error:
            self.failure = error

    def wait(self, seconds: float | None) -> bool:
        """Whether the call has ended, after at most this long; None: when it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


__all__ = ["everywhere", "together"]
