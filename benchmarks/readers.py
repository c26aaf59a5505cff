"""Threads that look up without a pause, and how long each lookup took."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

LookUp = Callable[[Tensor, Tensor], object]


@dataclass
class Latencies:
    """Seconds of every lookup of a phase, and how the phase went."""

    seconds: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    wall_s: float = 0.0
    failures: list[str] = field(default_factory=list)

    def __add__(self, other: Latencies) -> Latencies:
        joined = np.concatenate([self.seconds, other.seconds])
        return Latencies(joined, self.wall_s + other.wall_s, self.failures + other.failures)


def read_during(
    look_up: LookUp, batches: Sequence[Tensor], offsets: Tensor, readers: int, work: Callable[[], object]
) -> Latencies:
    """Latencies of `readers` threads while `work` runs; each starts at a place of its own among `batches`."""
    stop = threading.Event()
    taken: list[list[float]] = [[] for _ in range(readers)]
    failures: list[str] = []

    def loop(reader: int) -> None:
        turn = reader * len(batches) // readers
        while not stop.is_set():
            ids = batches[turn % len(batches)]
            start = time.perf_counter()
            try:
                look_up(ids, offsets)
            except Exception as error:
                failures.append(repr(error))
                return
            taken[reader].append(time.perf_counter() - start)
            turn += 1

    threads = [threading.Thread(target=loop, args=(i,), name=f"bench-reader-{i}") for i in range(readers)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    try:
        work()
    finally:
        stop.set()
        wall = time.perf_counter() - start
        for thread in threads:
            thread.join()
    return Latencies(np.concatenate([np.array(each) for each in taken]), wall, failures)


def read_once(look_up: LookUp, batches: Sequence[Tensor], offsets: Tensor, readers: int, seconds: float) -> Latencies:
    """Latencies of `readers` threads that share `batches`, each read once, until they or the seconds are over."""
    left = iter(batches)
    taken: list[list[float]] = [[] for _ in range(readers)]
    failures: list[str] = []
    begin = time.perf_counter()

    def loop(reader: int) -> None:
        while time.perf_counter() < begin + seconds:
            ids = next(left, None)
            if ids is None:
                return
            start = time.perf_counter()
            try:
                look_up(ids, offsets)
            except Exception as error:
                failures.append(repr(error))
                return
            taken[reader].append(time.perf_counter() - start)

    threads = [threading.Thread(target=loop, args=(i,), name=f"bench-reader-{i}") for i in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Latencies(np.concatenate([np.array(each) for each in taken]), time.perf_counter() - begin, failures)


__all__ = ["Latencies", "read_during", "read_once"]
