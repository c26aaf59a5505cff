"""Lookups, updates and swaps held at chosen places: what each lookup sees, and that none of them waits for the others.

A lookup is held in its read of the store, or in the TBE with its slots given; an update where it writes the log.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from torchrec_turbossd.errors import StoreError
from torchrec_turbossd.serving import TurboSSDInferenceModule
from torchrec_turbossd.tbe import successor
from torchrec_turbossd.tbe.device_serving import DeviceServingRows

ROWS, SLOTS, PART = 60, 24, 5
OLD, NEW = 1, 2


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[TurboSSDInferenceModule]:
    with opened(tmp_path, monkeypatch, request.param) as module:
        yield module


@pytest.fixture
def on_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TurboSSDInferenceModule]:
    """A module whose lookups others can come in between, after they were given slots: on a GPU that is one step."""
    with opened(tmp_path, monkeypatch, "cpu") as module:
        yield module


@contextmanager
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[TurboSSDInferenceModule]:
    monkeypatch.setattr("torchrec_turbossd.serving.sizing.LEAST_SLOTS", SLOTS)
    with TurboSSDInferenceModule.from_embedding_specs(
        [("t", ROWS, 4, SparseType.FP32)],
        tmp_path / "ssd",
        cache_hit_rate=0.05,
        pooling_mode=PoolingMode.NONE,
        name="m",
        output_dtype=SparseType.FP32,
        device=device,
    ) as module:
        assert module.slots == {"t": SLOTS}
        update(module, every(), OLD)
        yield module


def every() -> Tensor:
    return torch.arange(ROWS)


def part(number: int) -> Tensor:
    return torch.arange(number * PART, (number + 1) * PART)


def rows_of(ids: Tensor, stamp: int) -> Tensor:
    return torch.stack([ids, torch.full_like(ids, stamp), ids + stamp, -ids], dim=1).float()


def update(module: TurboSSDInferenceModule, ids: Tensor, stamp: int) -> None:
    module.streaming_update(ids, rows_of(ids, stamp), "t")


def look(module: TurboSSDInferenceModule, ids: Tensor) -> Tensor:
    device = module.tbe.device
    out: Tensor = module(ids.to(device), torch.arange(ids.numel() + 1, device=device))
    return out.cpu()


def stamp_of(module: TurboSSDInferenceModule, ids: Tensor) -> int:
    """The stamp of these rows, after checking that they have one."""
    out = look(module, ids)
    stamp = int(out[0, 1])
    assert torch.equal(out, rows_of(ids, stamp)), f"half an update, or another row: {out.tolist()}"
    return stamp


class Held:
    """The first call of a function is held, before or after it does its work, until `let_go`; later ones pass."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool = False) -> None:
        self._there, self._go = threading.Event(), threading.Event()
        self._first = threading.Lock()
        usual = getattr(owner, name)

        def hold(*arguments: Any, **named: Any) -> Any:
            if not self._first.acquire(blocking=False):
                return usual(*arguments, **named)
            done = usual(*arguments, **named) if after else None
            self._there.set()
            assert self._go.wait(30)
            return done if after else usual(*arguments, **named)

        patch.setattr(owner, name, hold)

    def wait(self) -> None:
        assert self._there.wait(30), "the call never came"

    def let_go(self) -> None:
        self._go.set()


class Doing:
    """Something done by another thread."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._found: list[Any] = []
        self._failures: list[BaseException] = []

        def run() -> None:
            try:
                self._found.append(act())
            except BaseException as failure:
                self._failures.append(failure)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    @property
    def goes_on(self) -> bool:
        self._thread.join(0.05)
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(30)
        assert not self._thread.is_alive(), "a thread hangs"
        if self._failures:
            raise self._failures[0]
        return self._found[0]


def test_nobody_waits_while_an_update_is_logged(
    module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp_of(module, part(0))
    held = Held(monkeypatch, module.tbe.rows.store, "commit", after=True)
    updating = Doing(lambda: update(module, torch.cat([part(0), part(1)]), NEW))
    held.wait()
    assert stamp_of(module, part(0)) == OLD, "rows in slots"
    assert stamp_of(module, part(1)) == OLD, "rows that are read from the store, where the new ones are logged already"
    assert stamp_of(module, torch.cat([part(0), part(1)])) == OLD
    held.let_go()
    updating.result()
    assert stamp_of(module, torch.cat([part(0), part(1)])) == NEW


def test_rows_that_were_given_to_a_lookup_stay(
    on_host: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = on_host
    ids = torch.cat([part(0), part(1)])
    stamp_of(module, ids)
    held = Held(monkeypatch, module.tbe, "_call")
    looking = Doing(lambda: stamp_of(module, ids))
    held.wait()
    update(module, part(1), NEW)
    assert stamp_of(module, part(1)) == NEW, "an update does not wait for lookups in flight, nor do later ones"
    for number in range(2, 12):
        stamp_of(module, part(number))
    update(module, ids, NEW + 1)
    held.let_go()
    assert looking.result() == OLD
    assert stamp_of(module, ids) == NEW + 1
    module.tbe.rows.cache.check()


@pytest.mark.parametrize("after", [False, True])
def test_a_lookup_that_reads_takes_the_updates_made_meanwhile(
    module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    stamp_of(module, part(0))
    held = Held(monkeypatch, module.tbe.rows.store, "read", after=after)
    ids = torch.cat([part(0), part(1), part(2)])
    looking = Doing(lambda: stamp_of(module, ids))
    held.wait()
    update(module, part(1), NEW)
    update(module, ids, NEW + 1)
    held.let_go()
    assert looking.result() == NEW + 1
    module.tbe.rows.cache.check()
    assert stamp_of(module, ids) == NEW + 1


def test_half_read_updates_are_not_seen(module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup that read some rows before an update, and needs others that left their slots since, reads again."""
    stamp_of(module, part(0))
    held = Held(monkeypatch, module.tbe.rows.store, "read", after=True)
    ids = torch.cat([part(0), part(1)])
    looking = Doing(lambda: stamp_of(module, ids))
    held.wait()
    for number in range(2, 12):
        stamp_of(module, part(number))
    update(module, ids, NEW)
    held.let_go()
    assert looking.result() == NEW


@pytest.mark.filterwarnings("ignore:a batch did not fit")
@pytest.mark.parametrize("after", [False, True])
def test_a_batch_beyond_the_slots_is_whole(
    module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    for number in range(3):
        stamp_of(module, part(number))
    rows = module.tbe.rows
    where = (rows.store, "read") if isinstance(rows, DeviceServingRows) else (rows, "_collect")
    held = Held(monkeypatch, *where, after=after)
    looking = Doing(lambda: stamp_of(module, every()))
    held.wait()
    update(module, every(), NEW)
    held.let_go()
    assert looking.result() == NEW


EITHER = [part(0), part(1), torch.cat([part(0), part(1)])]


@pytest.mark.parametrize("ids", EITHER[1:], ids=["read", "both"])
def test_a_lookup_that_reads_during_a_swap(
    module: TurboSSDInferenceModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: Tensor
) -> None:
    look_during_a_swap(module, tmp_path, monkeypatch, ids, reads=True)


@pytest.mark.parametrize("ids", EITHER, ids=["in slots", "read", "both"])
def test_a_lookup_in_flight_during_a_swap(
    on_host: TurboSSDInferenceModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: Tensor
) -> None:
    look_during_a_swap(on_host, tmp_path, monkeypatch, ids, reads=False)


def look_during_a_swap(
    module: TurboSSDInferenceModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: Tensor, *, reads: bool
) -> None:
    module.save_snapshot(tmp_path / "snapshot")
    update(module, every(), NEW)
    stamp_of(module, part(0))
    held = Held(monkeypatch, *((module.tbe.rows.store, "read") if reads else (module.tbe, "_call")), after=reads)
    looking = Doing(lambda: stamp_of(module, ids))
    held.wait()
    loading = Doing(lambda: module.load_snapshot(tmp_path / "snapshot"))
    while loading.goes_on and stamp_of(module, part(3)) != OLD:
        # Squeezing waits for the lookup that is held with slots: others go on meanwhile.
        if not reads:
            break
    held.let_go()
    assert looking.result() in ((OLD,) if reads else (OLD, NEW))
    loading.result()
    assert stamp_of(module, ids) == OLD
    module.tbe.rows.cache.check()


def test_lookups_and_updates_go_on_while_a_snapshot_is_read(
    module: TurboSSDInferenceModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.save_snapshot(tmp_path / "snapshot")
    update(module, every(), NEW)
    stamp_of(module, part(0))
    held = Held(monkeypatch, successor, "stored_rows")
    loading = Doing(lambda: module.load_snapshot(tmp_path / "snapshot"))
    held.wait()
    assert [stamp_of(module, part(n)) for n in range(12)] == [NEW] * 12
    updating = Doing(lambda: update(module, part(4), NEW + 1))
    while stamp_of(module, part(4)) == NEW:
        assert updating.goes_on
    held.let_go()
    updating.result()
    loading.result()
    assert [stamp_of(module, part(n)) for n in range(12)] == [OLD] * 4 + [NEW + 1] + [OLD] * 7


def test_an_update_that_fails_leaves_nothing(module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch) -> None:
    stamp_of(module, part(0))

    def fail(batch: object) -> None:
        raise StoreError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(module.tbe.rows.store, "commit", fail)
        with pytest.raises(StoreError, match="planted"):
            update(module, torch.cat([part(0), part(1)]), NEW)
    assert stamp_of(module, torch.cat([part(0), part(1)])) == OLD
    update(module, part(0), NEW)
    assert stamp_of(module, part(0)) == NEW


def test_slots_that_cannot_be_written_are_emptied(
    module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_what_cannot_be_written(module, monkeypatch, busy=False)


def test_slots_that_cannot_be_written_are_emptied_under_a_lookup(
    on_host: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_what_cannot_be_written(on_host, monkeypatch, busy=True)


def update_what_cannot_be_written(
    module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch, *, busy: bool
) -> None:
    """The update is logged and so it is made: rows that cannot be put into slots are read from the store."""
    stamp_of(module, part(0))

    def fail(*_: object) -> None:
        raise MemoryError("planted")

    held = Held(monkeypatch, module.tbe, "_call") if busy else None
    looking = Doing(lambda: stamp_of(module, part(0))) if busy else None
    if held is not None:
        held.wait()
    with monkeypatch.context() as patch:
        patch.setattr(module.tbe.rows.memory, "write", fail)
        update(module, part(0), NEW)
    if held is not None and looking is not None:
        held.let_go()
        assert looking.result() == OLD
    assert stamp_of(module, part(0)) == NEW
    module.tbe.rows.cache.check()


def test_an_update_is_made_whole_whatever_happens_in_slots(
    module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.cat([part(0), part(1)])
    stamp_of(module, ids)

    def fail(*_: object) -> None:
        raise MemoryError("planted")

    for name in ("_write",) if isinstance(module.tbe.rows, DeviceServingRows) else ("_fill_fresh", "_flip"):
        with monkeypatch.context() as patch:
            patch.setattr(module.tbe.rows, name, fail)
            update(module, ids, NEW)
        assert stamp_of(module, ids) == NEW
        update(module, ids, OLD)
    module.tbe.rows.cache.check()


def test_rows_that_are_updated_do_not_make_room_for_themselves(
    on_host: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = on_host
    ids = torch.arange(SLOTS)
    stamp_of(module, ids)
    held = Held(monkeypatch, module.tbe, "_call")
    looking = Doing(lambda: stamp_of(module, part(11)))
    held.wait()
    cache, evicted = module.tbe.rows.cache, []
    usual = cache.evict

    def evict(table: int, count: int) -> Tensor:
        before = set(cache.resident(table)[0].tolist())
        slots = usual(table, count)
        evicted.extend(before - set(cache.resident(table)[0].tolist()))
        return slots

    monkeypatch.setattr(cache, "evict", evict)
    chosen = cache.hottest(0)[0].flip(0)[:5].cpu()
    update(module, chosen, NEW)
    held.let_go()
    assert looking.result() == OLD
    assert evicted and not set(evicted) & set(chosen.tolist())
    assert stamp_of(module, chosen) == NEW
