"""Readers, an updater and a swapper at once: no row is wrong, no update half seen, no two snapshots in one answer.

`TURBOSSD_STRESS_SECONDS` makes it longer.
"""

from __future__ import annotations

import os
import random
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.serving.stamped import (
    GROUPS,
    MEMBERS,
    ROWS,
    Group,
    look_at_all,
    look_at_groups,
    members,
    opened,
    write,
    write_all,
)
from torchrec_turbossd.serving import TurboSSDInferenceModule

SECONDS = float(os.environ.get("TURBOSSD_STRESS_SECONDS", "6"))


@dataclass
class Load:
    """A load of a snapshot: the last update acknowledged before it began, and the last issued when it had returned."""

    generation: int
    acknowledged_before: int = 0
    issued_until_done: int = 0


@dataclass
class History:
    """What was asked of the module, in order. Numbers rise before the act that they stand for, or after it."""

    writes: dict[Group, list[int]] = field(
        default_factory=lambda: {(n, g): [] for n in GROUPS for g in range(GROUPS[n])}
    )
    issued: int = 0
    acknowledged: int = 0
    loads: list[Load] = field(default_factory=lambda: [Load(generation=0)])
    loads_done: int = 1

    def written_between(self, group: Group, after: int, until: int) -> bool:
        """Whether one of the updates in (after, until] wrote the group."""
        numbers = self.writes[group]
        place = bisect_right(numbers, after)
        return place < len(numbers) and numbers[place] <= until

    def check_view(self, begun: tuple[int, int], groups: dict[Group, tuple[int, int]], fixed: set[int]) -> None:
        """One lookup saw one moment: the rows of one snapshot, with the updates up to some one on top.

        Args:
            begun: `acknowledged` and `loads_done` before the lookup.
            groups: (generation, update) of each group that was looked up; update 0 is the snapshot's own row.
            fixed: generations of the rows that no update writes.
        """
        generations = {generation for generation, update in groups.values() if update == 0} | fixed
        assert len(generations) == 1, f"rows of snapshots {generations} in one lookup"
        acknowledged, done = begun
        loads = self.loads[done - 1 :]
        floors = [load.acknowledged_before for load in loads if load.generation in generations]
        assert floors, f"snapshot {generations}, when {loads} could be served"
        updates = [update for _, update in groups.values() if update]
        newest, oldest = max(updates, default=0), min(updates, default=0)
        assert not updates or oldest > min(floors), f"update {oldest}, which {loads} had replaced"
        for group, (_, update) in groups.items():
            # What a load has not carried over is older than all that is seen.
            since = update or oldest - 1
            assert not self.written_between(group, since, newest), f"{group} at {update} beside update {newest}"
            if len(loads) == 1:
                # No load has begun since: updates issued after the last one are there once they are acknowledged.
                missed = self.written_between(group, max(update, loads[0].issued_until_done), acknowledged)
                assert not missed, f"{group} at {update} after {acknowledged} was acknowledged"


class Reader:
    """Looks up whole groups and some fixed rows, those with low numbers more often."""

    def __init__(self, module: TurboSSDInferenceModule, history: History, seed: int) -> None:
        self.module, self.history, self.random = module, history, random.Random(seed)
        self.lookups = dict.fromkeys(ROWS, 0)

    def __call__(self) -> None:
        fixed = torch.tensor(sorted({self._number(ROWS["fixed"]) for _ in range(40)}))
        self.read({name: self._groups(name) for name in GROUPS}, fixed)

    def _number(self, below: int) -> int:
        return int(below * self.random.random() ** 2)

    def _groups(self, name: str) -> list[int]:
        if self.random.random() < 0.01:
            # More rows than slots.
            return list(range(GROUPS[name]))
        return sorted({self._number(GROUPS[name]) for _ in range(self.random.choice([0, 1, 3, 10]))})

    def read(self, chosen: dict[str, list[int]], fixed: Tensor) -> dict[Group, tuple[int, int]]:
        for name, groups in chosen.items():
            self.lookups[name] += MEMBERS * len(groups)
        self.lookups["fixed"] += fixed.numel()
        begun = self.history.acknowledged, self.history.loads_done
        found, (generations, updates) = look_at_groups(self.module, chosen, fixed)
        assert not updates.any()
        self.history.check_view(begun, found, set(generations.tolist()))
        return found


class Updater:
    """Writes 64 to 256 rows a call: groups of one table, or of both."""

    def __init__(self, module: TurboSSDInferenceModule, history: History, seed: int) -> None:
        self.module, self.history, self.random = module, history, random.Random(seed)

    def __call__(self) -> None:
        names = self.random.choice([["first"], ["second"], ["first", "second"]])
        count = self.random.randint(64 // MEMBERS, 256 // MEMBERS)
        every = [(name, group) for name in names for group in range(GROUPS[name])]
        chosen = [*{name: (name, 0) for name in names}.values(), *self.random.sample(every, count - len(names))]
        groups = set(chosen)
        number = self.history.issued + 1
        for group in groups:
            self.history.writes[group].append(number)
        self.history.issued = number
        ids = {name: torch.cat([members(g) for g in sorted(groups) if g[0] == name]) for name in names}
        write(self.module, ids, 0, number)
        self.history.acknowledged = number


class Swapper:
    """Loads one snapshot and the other in turn."""

    def __init__(self, module: TurboSSDInferenceModule, history: History, snapshots: dict[int, Path]) -> None:
        self.module, self.history, self.snapshots = module, history, snapshots

    def __call__(self) -> None:
        history = self.history
        load = Load(generation=history.loads_done % len(self.snapshots) + 1, acknowledged_before=history.acknowledged)
        history.loads.append(load)
        self.module.load_snapshot(self.snapshots[load.generation])
        load.issued_until_done = history.issued
        history.loads_done += 1
        time.sleep(0.05)


class Crew:
    """Threads that repeat what they do until time is up; the first failure ends all and is raised."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self.counts: dict[str, int] = {}

    def add(self, name: str, act: Callable[[], None]) -> None:
        self.counts[name] = 0

        def repeat() -> None:
            try:
                while not self._stop.is_set():
                    act()
                    self.counts[name] += 1
            except BaseException as error:
                self._failures.append(error)
                self._stop.set()

        self._threads.append(threading.Thread(target=repeat, name=name, daemon=True))

    def run(self, seconds: float) -> None:
        for thread in self._threads:
            thread.start()
        self._stop.wait(seconds)
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        if self._failures:
            raise self._failures[0]
        assert not any(t.is_alive() for t in self._threads), "a thread hangs"


@pytest.fixture
def snapshots(tmp_path: Path) -> dict[int, Path]:
    """Snapshots of generation 1 and 2, each with every row."""
    paths = {}
    for generation in (1, 2):
        paths[generation] = tmp_path / f"snapshot-{generation}"
        with opened(tmp_path / f"made-{generation}") as module:
            write_all(module, generation)
            module.save_snapshot(paths[generation])
    return paths


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def module(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[TurboSSDInferenceModule]:
    with opened(tmp_path / "ssd", request.param) as module:
        assert all(module.slots[name] < ROWS[name] for name in ROWS)
        write_all(module, 0)
        yield module


LONG = [pytest.mark.slow, pytest.mark.timeout(2 * SECONDS + 300)] if SECONDS > 10 else []


@pytest.mark.filterwarnings("ignore:a batch did not fit")
@pytest.mark.parametrize("swaps", [pytest.param(False, marks=LONG), pytest.param(True, marks=LONG)])
def test_readers_an_updater_and_a_swapper(
    swaps: bool, module: TurboSSDInferenceModule, snapshots: dict[int, Path], tmp_path: Path, seed: int
) -> None:
    history, crew = History(), Crew()
    readers = [Reader(module, history, seed + number) for number in range(4)]
    for number, reader in enumerate(readers):
        crew.add(f"reader {number}", reader)
    crew.add("updater", Updater(module, history, seed))
    if swaps:
        crew.add("swapper", Swapper(module, history, snapshots))
    taken = [0, 0, 0]
    module.get_read_hit_rate_stats()

    def take() -> None:
        time.sleep(0.01)
        for place, count in enumerate(module.get_read_hit_rate_stats()):
            taken[place] += count

    crew.add("counter", take)
    crew.run(SECONDS * (2 / 3 if swaps else 1 / 3))
    print(f"{crew.counts}, hits, misses and reads {taken}")
    assert min(crew.counts.values()) > 1, crew.counts
    take()
    every = {name: list(range(GROUPS[name])) for name in GROUPS}
    last = readers[0].read(every, torch.arange(ROWS["fixed"]))
    take()
    lookups = {name: sum(reader.lookups[name] for reader in readers) for name in ROWS}
    assert taken[0] + taken[1] == taken[2] == sum(lookups.values())
    for name, reads in module.read_stats().items():
        assert reads.read_hit_count + reads.read_miss_count == reads.read_total_count == lookups[name]
    module.close()
    with opened(tmp_path / "ssd") as again:
        assert look_at_all(again) == last
