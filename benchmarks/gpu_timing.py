"""Milliseconds of work on a device, of several sides in turns."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.timing import Pair

Work = Callable[[Sequence[Tensor]], object]
"""Looks batches of ids up one after the other, or trains on them."""


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """From an idle device to the end of `work`: by CUDA events, by the clock on a CPU."""
    wait(device)
    if device.type != "cuda":
        begun = time.perf_counter()
        work()
        return (time.perf_counter() - begun) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


class Turns:
    """Milliseconds a batch of each side, round by round.

    Attributes:
        rounds: by side.
    """

    def __init__(self, rounds: Mapping[str, Sequence[float]]) -> None:
        self.rounds = {side: tuple(found) for side, found in rounds.items()}

    def pair(self, ours: str, theirs: str, per: Callable[[float], float] = float) -> Pair:
        """Two sides beside each other; `per` turns milliseconds into what is told."""
        mine, others = (tuple(per(ms) for ms in self.rounds[side]) for side in (ours, theirs))
        return Pair(mine, others)

    def median(self, side: str) -> float:
        return statistics.median(self.rounds[side])


def back_to_back(sides: Mapping[str, Work], rounds: Sequence[Sequence[Tensor]], device: torch.device) -> Turns:
    """Each side does all batches of a round one after the other, then the next side does; the first takes turns."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    names = list(sides)
    for turn, batches in enumerate(rounds):
        first = turn % len(names)
        for side in names[first:] + names[:first]:
            work = functools.partial(sides[side], batches)
            found[side].append(milliseconds(work, device) / len(batches))
    return Turns(found)


def each_alone(sides: Mapping[str, Work], batches: Sequence[Tensor], device: torch.device) -> Turns:
    """Every batch with the device idle before and after it."""
    return back_to_back(sides, [[batch] for batch in batches], device)


def split_rounds(batches: Sequence[Tensor], rounds: int) -> list[list[Tensor]]:
    """Batches in `rounds` lists of equal length, each batch in one of them; left over ones in none."""
    each = len(batches) // rounds
    return [list(batches[i * each : (i + 1) * each]) for i in range(rounds)]


def copy_rates(device: torch.device, count: int) -> tuple[float, float]:
    """GB/s of a copy of `count` bytes within the device (read and written counted), and from pinned host memory."""
    pinned = device.type == "cuda"
    host = torch.empty(count // 4, dtype=torch.uint8, pin_memory=pinned).fill_(7)
    here = torch.empty(count, dtype=torch.uint8, device=device).fill_(7)
    there = torch.empty_like(here)
    inside = [milliseconds(lambda: there.copy_(here), device) for _ in range(8)]
    across = [milliseconds(lambda: there[: host.numel()].copy_(host, non_blocking=True), device) for _ in range(8)]
    return 2 * count / min(inside) / 1e6, host.numel() / min(across) / 1e6


__all__ = [
    "Turns",
    "Work",
    "back_to_back",
    "copy_rates",
    "each_alone",
    "milliseconds",
    "split_rounds",
    "wait",
]
