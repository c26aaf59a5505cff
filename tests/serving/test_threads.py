"""Lookups, updates and swaps at once: no wrong row, no half of an update, no two snapshots in one answer."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from torchrec_turbossd.errors import StoreError
from torchrec_turbossd.serving import TurboSSDInferenceModule
from torchrec_turbossd.store.contract import Rows

GROUPS, MEMBERS = 12, 5
ROWS = GROUPS * MEMBERS
FIXED = 40
"""Rows of the table that only snapshots change."""
SPECS = [("grouped", ROWS, 4, SparseType.FP32), ("fixed", FIXED, 4, SparseType.FP32)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[TurboSSDInferenceModule]:
    monkeypatch.setattr("torchrec_turbossd.serving.sizing.LEAST_SLOTS", 22)
    with TurboSSDInferenceModule.from_embedding_specs(
        SPECS,
        tmp_path / "ssd",
        cache_hit_rate=0.1,
        pooling_mode=PoolingMode.NONE,
        ssd_shards=2,
        name="m",
        output_dtype=SparseType.FP32,
        device=request.param,
    ) as module:
        assert module.slots == {"grouped": 22, "fixed": 22}
        yield module


def rows_of(ids: Tensor, stamp: int) -> Tensor:
    """Rows that say which they are and when they were written."""
    return torch.stack([ids.float(), torch.full_like(ids, stamp).float(), ids.float() + stamp, -ids.float()], dim=1)


def group(number: int) -> Tensor:
    """Ids that are always updated together."""
    return torch.arange(number, ROWS, GROUPS)


def write_group(module: TurboSSDInferenceModule, number: int, stamp: int) -> None:
    ids = group(number)
    module.streaming_update(ids, rows_of(ids, stamp), "grouped")


def write_all(module: TurboSSDInferenceModule, stamp: int) -> None:
    """Both tables in one call, by linear ids."""
    ids = torch.cat([torch.arange(ROWS), torch.arange(FIXED)])
    module.streaming_update(torch.arange(ROWS + FIXED), rows_of(ids, stamp))


def look(module: TurboSSDInferenceModule, ids: Tensor, offsets: list[int]) -> Tensor:
    """A lookup on the module's device, its answer on the CPU."""
    device = module.tbe.device
    out: Tensor = module(ids.to(device), torch.tensor(offsets, device=device))
    return out.cpu()


def read_group(module: TurboSSDInferenceModule, number: int) -> int:
    """The stamp of a group, after checking that it has one."""
    ids = group(number)
    out = look(module, ids, [0, MEMBERS, MEMBERS])
    stamp = int(out[0, 1])
    assert torch.equal(out, rows_of(ids, stamp)), f"half an update, or another row: {out.tolist()}"
    return stamp


def read_fixed(module: TurboSSDInferenceModule, ids: Tensor) -> int:
    out = look(module, ids, [0, 0, ids.numel()])
    stamp = int(out[0, 1])
    assert torch.equal(out, rows_of(ids, stamp)), f"rows of two snapshots: {out.tolist()}"
    return stamp


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

        self._threads.append(threading.Thread(target=repeat, name=name))

    def run(self, seconds: float) -> None:
        for thread in self._threads:
            thread.start()
        self._stop.wait(seconds)
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(t.is_alive() for t in self._threads), "a thread hangs"
        if self._failures:
            raise self._failures[0]


def slow_writes(module: TurboSSDInferenceModule, patch: pytest.MonkeyPatch) -> None:
    """Time between the moment a write is visible and the moment it has returned, in which lookups go on."""
    store = module.tbe.rows.store
    usual = store.write

    def write(batch: dict[str, Rows]) -> None:
        time.sleep(0.001)
        usual(batch)
        time.sleep(0.001)

    patch.setattr(store, "write", write)


def test_readers_and_an_updater(module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer is whole, and not older than the last update that had returned when the lookup began."""
    write_all(module, 0)
    slow_writes(module, monkeypatch)
    acknowledged = [0] * GROUPS
    crew, lookups = Crew(), [0, 0]

    def reader(number: int) -> Callable[[], None]:
        chooser = random.Random(number)

        def act() -> None:
            chosen = chooser.randrange(GROUPS)
            least = acknowledged[chosen]
            stamp = read_group(module, chosen)
            lookups[number] += MEMBERS
            assert stamp >= least, f"group {chosen}: {stamp} after {least} was acknowledged"

        return act

    chooser = random.Random(9)

    def updater() -> None:
        chosen = chooser.randrange(GROUPS)
        write_group(module, chosen, acknowledged[chosen] + 1)
        acknowledged[chosen] += 1

    module.get_read_hit_rate_stats()
    crew.add("first reader", reader(0))
    crew.add("second reader", reader(1))
    crew.add("updater", updater)
    crew.run(2.5)
    assert min(crew.counts.values()) > 20, crew.counts
    hits, misses, total = module.get_read_hit_rate_stats()
    assert total == sum(lookups) == hits + misses and hits > 0 and misses > 0
    stats = module.read_stats()["grouped"]
    assert (stats.read_hit_count, stats.read_miss_count, stats.read_total_count) == (hits, misses, total)
    module.tbe.rows.cache.check()
    assert [read_group(module, g) for g in range(GROUPS)] == acknowledged


@pytest.mark.filterwarnings("ignore:a batch did not fit")
def test_readers_an_updater_and_a_swapper(module: TurboSSDInferenceModule, tmp_path: Path) -> None:
    """Rows of one answer are all of one snapshot, or of one update since."""
    snapshots = 3
    for number in range(snapshots):
        write_all(module, number * 1000)
        module.save_snapshot(tmp_path / f"snapshot-{number}")
    crew, stamps = Crew(), [0] * GROUPS
    served: set[int] = set()

    def reader(number: int) -> Callable[[], None]:
        chooser = random.Random(number)

        def act() -> None:
            read_group(module, chooser.randrange(GROUPS))
            ids = torch.tensor(sorted(chooser.sample(range(FIXED), chooser.choice([3, 20, 30]))))
            served.add(read_fixed(module, ids))

        return act

    chooser = random.Random(9)

    def updater() -> None:
        chosen = chooser.randrange(GROUPS)
        stamps[chosen] += 1
        write_group(module, chosen, 100_000 + stamps[chosen])
        time.sleep(0.002)

    def swapper() -> None:
        module.load_snapshot(tmp_path / f"snapshot-{chooser.randrange(snapshots)}")

    crew.add("first reader", reader(0))
    crew.add("second reader", reader(1))
    crew.add("updater", updater)
    crew.add("swapper", swapper)
    crew.run(2.5)
    assert min(crew.counts.values()) > 5, crew.counts
    assert served == {0, 1000, 2000}
    module.tbe.rows.cache.check()
    last = module.load_snapshot(tmp_path / "snapshot-1")
    assert last is None and read_fixed(module, torch.arange(FIXED)) == 1000


def test_a_lookup_during_an_update(module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in slots are answered as they were; a row that is not waits for the update; both then are new."""
    write_all(module, 0)
    read_group(module, 0)
    # Group 1 lies half in slots.
    look(module, group(1)[:3], [0, 3, 3])
    store, written, proceed = module.tbe.rows.store, threading.Event(), threading.Event()
    usual = store.write

    def write(batch: dict[str, Rows]) -> None:
        usual(batch)
        written.set()
        assert proceed.wait(30)

    monkeypatch.setattr(store, "write", write)
    ids = torch.cat([group(0), group(1)])
    update = threading.Thread(target=lambda: module.streaming_update(ids, rows_of(ids, 1), "grouped"))
    update.start()
    assert written.wait(30)
    assert read_group(module, 0) == 0
    assert read_group(module, 2) == 0, "rows that no update touches are read from the store meanwhile"
    found: list[int] = []
    waiting = threading.Thread(target=lambda: found.append(read_group(module, 1)))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive() and not found
    assert read_group(module, 0) == 0, "one lookup that waits holds up no other"
    proceed.set()
    update.join(30)
    waiting.join(30)
    assert found == [1]
    assert read_group(module, 0) == 1


@pytest.mark.filterwarnings("ignore:a batch did not fit")
def test_a_batch_beyond_the_slots_during_an_update(
    module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(module, 0)
    for number in range(3):
        read_group(module, number)
    store, written, proceed = module.tbe.rows.store, threading.Event(), threading.Event()
    usual = store.write

    def write(batch: dict[str, Rows]) -> None:
        usual(batch)
        written.set()
        assert proceed.wait(30)

    monkeypatch.setattr(store, "write", write)
    update = threading.Thread(target=lambda: write_all(module, 1))
    update.start()
    assert written.wait(30)
    every = torch.arange(ROWS)
    found: list[Tensor] = []
    waiting = threading.Thread(target=lambda: found.append(look(module, every, [0, ROWS, ROWS])))
    waiting.start()
    waiting.join(0.05)
    proceed.set()
    update.join(30)
    waiting.join(30)
    assert torch.equal(found[0], rows_of(every, 1))


def test_an_update_that_fails_releases_the_lookups(
    module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(module, 0)
    started, proceed = threading.Event(), threading.Event()

    def write(batch: dict[str, Rows]) -> None:
        started.set()
        assert proceed.wait(30)
        raise StoreError("planted")

    failures: list[StoreError] = []

    def update() -> None:
        try:
            write_group(module, 3, 1)
        except StoreError as error:
            failures.append(error)

    with monkeypatch.context() as patch:
        patch.setattr(module.tbe.rows.store, "write", write)
        updating = threading.Thread(target=update)
        updating.start()
        assert started.wait(30)
        found: list[int] = []
        waiting = threading.Thread(target=lambda: found.append(read_group(module, 3)))
        waiting.start()
        proceed.set()
        updating.join(30)
        waiting.join(30)
    assert len(failures) == 1 and found == [0]
    write_group(module, 3, 2)
    assert read_group(module, 3) == 2


def test_a_lookup_does_not_wait_for_a_swap(
    module: TurboSSDInferenceModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that is stuck in its reading of the new generation holds up neither lookups nor updates."""
    write_all(module, 5)
    module.save_snapshot(tmp_path / "snapshot")
    write_all(module, 6)
    read_group(module, 0)
    import torchrec_turbossd.serving.swap as swap

    reading, proceed = threading.Event(), threading.Event()
    usual = swap.stored_rows

    def wait_and_read(*arguments: object) -> Tensor:
        reading.set()
        assert proceed.wait(30)
        return usual(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(swap, "stored_rows", wait_and_read)
    loading = threading.Thread(target=lambda: module.load_snapshot(tmp_path / "snapshot"))
    loading.start()
    assert reading.wait(30)
    assert [read_group(module, g) for g in range(GROUPS)] == [6] * GROUPS
    write_group(module, 4, 7)
    assert read_group(module, 4) == 7
    proceed.set()
    loading.join(30)
    assert [read_group(module, g) for g in range(GROUPS)] == [5, 5, 5, 5, 7, *[5] * (GROUPS - 5)]
