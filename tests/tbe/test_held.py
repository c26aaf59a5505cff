"""Batches that are prefetched or held for serving on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import cast

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor

from torchrec_turbossd.cache.current_stream import CurrentStream
from torchrec_turbossd.errors import (
    CacheFullError,
    ClosedError,
    InputError,
    RowIndexError,
    StoreError,
    UnsupportedError,
)
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tables import TableShard, TableSpec
from torchrec_turbossd.tbe.serving import ServingOptions, TurboSSDIntNBitTableBatchedEmbeddingBags
from torchrec_turbossd.tbe.serving_order import ServingOrder
from torchrec_turbossd.tbe.successor import Successor

ROWS, SLOTS = 400, 60
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Store:
    """Rows of one table that hold a number each."""

    def __init__(self, plus: float) -> None:
        self.numbers = torch.arange(ROWS, dtype=torch.float32) + plus

    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        return _rows(self.numbers[ids]), torch.ones(ids.numel(), dtype=torch.bool)

    def commit(self, batch: Mapping[str, Rows]) -> Mapping[str, Rows]:
        return batch

    def publish(self, committed: Mapping[str, Rows]) -> None:
        for ids, rows in committed.values():
            self.numbers[ids] = rows.view(torch.float32)[:, 0]


def _rows(numbers: Tensor) -> Tensor:
    return numbers[:, None].expand(-1, 4).contiguous().view(torch.uint8)


class Served:
    """One table of FP32 rows that hold their own id."""

    def __init__(self, device: str, dram: int | None = ROWS, slots: int = SLOTS) -> None:
        self.device = torch.device(device)
        self.shard = TableShard.whole(TableSpec(name="t", rows=ROWS, dim=4, data_type=SparseType.FP32))
        self.tbe = TurboSSDIntNBitTableBatchedEmbeddingBags(
            [self.shard],
            [slots],
            [0],
            Store(0.0),
            device=device,
            options=ServingOptions(output_dtype=SparseType.FP32),
            dram_slots=None if dram is None else [dram],
        )

    def set(self, ids: Tensor, plus: float) -> None:
        """Update rows to their id and something."""
        self.tbe.rows.update({0: (ids, _rows(ids.to(torch.float32) + plus))})

    def args(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        return torch.tensor(ids, dtype=torch.int64, device=self.device), torch.arange(len(ids) + 1, device=self.device)

    def reads(self) -> tuple[int, int]:
        found = self.tbe.rows.counters.read()["t"]
        return found.read_total_count, found.read_hit_count

    def give(self, ids: list[int]) -> list[float]:
        return self.tbe(*self.args(ids))[:, 0].tolist()


@pytest.fixture(params=DEVICES)
def served(request: pytest.FixtureRequest) -> Served:
    return Served(request.param)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dram", [None, ROWS, 100])
def test_what_was_prefetched_hits(device: str, dram: int | None) -> None:
    """Without being counted itself; on a CPU without a device's account of slots as well."""
    served = Served(device, dram)
    ids = [5, 9, 5, 300]
    served.tbe.prefetch(*served.args(ids))
    assert served.reads() == (0, 0)
    assert served.give(ids) == ids
    assert served.reads() == (4, 4)
    served.tbe.prefetch(*served.args([]))
    served.tbe.prefetch(*served.args(list(range(SLOTS + 1))))
    with pytest.raises(RowIndexError):
        served.tbe.prefetch(*served.args([ROWS]))
    assert served.give([7]) == [7]


@pytest.mark.gpu
def test_a_prefetch_beside_lookups() -> None:
    """On a stream of its own, with the next batch each time, while rows change; lookups stay right."""
    served, side = Served("cuda", slots=100), torch.cuda.Stream()
    generator = torch.Generator().manual_seed(4)
    batches = [torch.randint(0, ROWS, (40,), generator=generator).tolist() for _ in range(150)]
    plus = 0.0
    for number, ids in enumerate(batches[:-1]):
        out = served.tbe(*served.args(ids))
        with torch.cuda.stream(side):
            served.tbe.prefetch(*served.args(batches[number + 1]))
        if number % 10 == 9:
            plus += 1000
            served.set(torch.arange(ROWS), plus)
            assert served.give(ids) == [i + plus for i in ids]
        else:
            assert out[:, 0].tolist() == [i + plus for i in ids]
    served.tbe.rows.cache.check()
    total, hits = served.reads()
    assert hits > 0.9 * total


def test_a_held_batch_is_looked_up_again_and_again(served: Served) -> None:
    """Its rows stay whatever others need, show updates, and count once."""
    with served.tbe.hold(*served.args([3, 4, 3])) as held:
        for start in range(0, 360, 40):
            others = list(range(start, start + 40))
            assert served.give(others) == others
        assert held.lookup()[:, 0].tolist() == [3, 4, 3]
        served.set(torch.tensor([4]), 0.5)
        assert held.lookup()[:, 0].tolist() == [3, 4.5, 3]
        before = served.reads()
        held.bring(*_padded(served, [8, 9], 3))
        assert held.lookup()[:, 0].tolist() == [8, 9, 0]
        assert served.reads()[0] == before[0] + 2
    served.tbe.rows.cache.check()
    with pytest.raises(ClosedError, match="no batch is held"):
        held.lookup()


def _padded(served: Served, ids: list[int], bags: int) -> tuple[Tensor, Tensor]:
    """Fewer ids in as many bags, the last ones empty."""
    offsets = torch.arange(bags + 1, device=served.device).clamp(max=len(ids))
    return torch.tensor(ids, device=served.device, dtype=torch.int64), offsets


def test_what_cannot_be_held(served: Served) -> None:
    """After which nothing is held, and the next batch can be."""
    held = served.tbe.hold(*served.args([1, 2]))
    for given, error in (
        (served.args([1, 2, 3]), InputError),
        (_padded(served, [1, 2, 3], 2), InputError),
        (served.args([1, ROWS]), RowIndexError),
    ):
        with pytest.raises(error):
            held.bring(*given)
        with pytest.raises(ClosedError):
            held.run(lambda: None)
    held.bring(*_padded(served, [], 2))
    assert held.lookup()[:, 0].tolist() == [0, 0]
    held.bring(*served.args([2, 1]))
    assert held.lookup()[:, 0].tolist() == [2, 1]
    with pytest.raises(CacheFullError):
        served.tbe.hold(*served.args(list(range(SLOTS + 1))))
    held.release()
    held.release()
    served.tbe.rows.cache.check()
    with pytest.raises(UnsupportedError, match="on a GPU"):
        Served("cpu", None).tbe.hold(*Served("cpu").args([1]))


@pytest.mark.gpu
def test_a_graph_of_a_held_batch() -> None:
    """Captured once, replayed for other batches, with updates from another thread in between."""
    served = Served("cuda")
    ids, offsets = served.args([3, 4, 5])
    held = served.tbe.hold(ids, offsets)
    held.lookup()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = held.lookup() * 2
    stop = threading.Event()

    def update() -> None:
        while not stop.is_set():
            served.set(torch.arange(200, ROWS), 0.25)

    other = threading.Thread(target=update)
    other.start()
    try:
        for first in range(0, 190):
            # The memory of the batch before may be written as soon as it is replayed.
            ids.copy_(torch.arange(first, first + 3))
            held.bring(ids, offsets)
            held.run(graph.replay)
            assert out[:, 0].tolist() == [2 * first, 2 * first + 2, 2 * first + 4]
    finally:
        stop.set()
        other.join()


def test_another_version_while_a_batch_is_held(served: Served) -> None:
    """What is held is of the old one until it moves on, and all slots are the new one's then."""
    rows = served.tbe.rows
    held = served.tbe.hold(*served.args([3, 4]))
    swap = Successor(rows, Store(1000.0), [served.shard])
    swap.squeeze()
    swap.take_over()
    swap.retire()
    assert served.give(list(range(30))) == [1000 + i for i in range(30)]
    assert held.lookup()[:, 0].tolist() == [3, 4]
    held.bring(*served.args([4, 5]))
    assert held.lookup()[:, 0].tolist() == [1004, 1005]
    held.release()
    assert rows.served.capacity == [SLOTS] and served.give(list(range(SLOTS))) == [1000 + i for i in range(SLOTS)]
    rows.cache.check()


def test_a_row_that_cannot_be_updated_while_it_is_held(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch says so, rather than show the old row, or another one."""

    def fail(*args: object) -> None:
        raise MemoryError("planted")

    held = served.tbe.hold(*served.args([3, 4]))
    with monkeypatch.context() as patch:
        patch.setattr(served.tbe.rows.memory, "write", fail)
        served.set(torch.tensor([3]), 0.5)
    assert served.give([3]) == [3.5]
    with pytest.raises(StoreError, match="bring"):
        held.lookup()
    held.bring(*served.args([3, 4]))
    assert held.lookup()[:, 0].tolist() == [3.5, 4]
    held.release()
    served.tbe.rows.cache.check()


def test_buffers_outlive_inference_mode(served: Served) -> None:
    with torch.inference_mode():
        assert served.give([1, 2]) == [1, 2]
        held = served.tbe.hold(*served.args([1, 2]))
    assert served.give([3, 300]) == [3, 300]
    held.bring(*served.args([5, 6]))
    assert held.lookup()[:, 0].tolist() == [5, 6]
    held.bring(*_padded(served, [], 2))
    assert held.lookup()[:, 0].tolist() == [0, 0]


def test_weights_of_a_held_batch_are_checked(served: Served) -> None:
    held = served.tbe.hold(*served.args([1, 2]))
    weights = torch.tensor([2.0, 0.5], dtype=torch.float64, device=served.device)
    assert held.lookup(weights)[:, 0].tolist() == [2, 1]
    with pytest.raises(InputError, match="per_sample_weights"):
        held.lookup(weights[:1])


def test_a_held_batch_that_is_dropped_gives_its_slots_back(served: Served) -> None:
    for first in range(0, 390, 5):
        served.tbe.hold(*served.args(list(range(first, first + 5))))
    assert served.give(list(range(SLOTS))) == list(range(SLOTS))
    served.tbe.rows.cache.check()
    assert served.reads()[0] > 0


def test_a_prefetch_after_a_lookup_that_failed_waits_for_all() -> None:
    """What was launched after such a lookup is account, which a prefetch must not overlap."""
    order = ServingOrder(torch.device("cpu"))
    stream, other = (cast(torch.cuda.Stream, FakeStream()) for _ in range(2))
    current = [stream]
    order._current = cast(CurrentStream, lambda: current[0])
    order._marks = [cast(torch.cuda.Event, FakeEvent()) for _ in range(3)]
    order.follow()
    order.accounted()
    assert order.looked_up()
    current[0] = other
    assert order.beside()
    order.unmark()
    assert not order.beside()
    assert other.waited == ["event", "event", stream]  # type: ignore[attr-defined]


class FakeEvent:
    """As much of an event as an order uses."""

    def record(self, stream: object) -> None:
        """Nothing is waited for here."""


class FakeStream:
    """A stream that notes what it is told to wait for."""

    def __init__(self) -> None:
        self.waited: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited.append("event")

    def wait_stream(self, stream: object) -> None:
        self.waited.append(stream)
