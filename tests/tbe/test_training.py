"""The training TBE against the stock one that holds whole tables, on every device there is."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

from tests.tbe.pair import OPTIMIZERS, ROWS, Pair, shards_of
from torchrec_turbossd.errors import (
    CacheFullError,
    ClosedError,
    ConfigError,
    InputError,
    RowIndexError,
    StoreFullError,
    UnsupportedError,
)
from torchrec_turbossd.tables import weight_bytes
from torchrec_turbossd.tbe.cached_rows import CachedRows
from torchrec_turbossd.tbe.layout import Bounds
from torchrec_turbossd.tbe.training import ROW_STATE, TurboSSDTableBatchedEmbeddingBags, row_state

DIM_BYTES = 8 * 4 + 4
"""Of a row of the first table: weights, and row-wise state."""


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a batch did not fit")
        yield


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("slots", [(5, 5), (45, 30), (90, 60), ROWS])
def test_trains_like_stock(device: str, optimizer: EmbOptimType, slots: tuple[int, int]) -> None:
    pair = Pair(device, slots, optimizer)
    for seed in range(50):
        pair.step(seed)
    pair.same()
    pair.ours.flush()
    for table, shard in enumerate(pair.shards):
        ids = torch.arange(shard.rows)
        rows, found = pair.store.read(shard.key, ids)
        assert torch.equal(rows[found], pair.ours.read_rows(table, ids)[found])
        assert not pair.ours.rows.cache.dirty(table)[0].numel()


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", sorted(set(ROW_STATE) - set(OPTIMIZERS), key=lambda o: o.name))
@pytest.mark.parametrize("slots", [(5, 5), (45, 30), ROWS])
def test_trains_like_stock_with_optimizers_of_cuda(optimizer: EmbOptimType, slots: tuple[int, int]) -> None:
    pair = Pair("cuda:0", slots, optimizer, weight_decay=0.01)
    for seed in range(30):
        pair.step(seed)
    pair.same()


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": PoolingMode.MEAN},
        {"pooling": PoolingMode.NONE},
        {"data_type": SparseType.FP16, "stochastic_rounding": False},
        {"weight_decay": 0.01, "max_gradient": 0.5},
    ],
    ids=lambda o: next(iter(o)),
)
def test_trains_like_stock_with(device: str, options: dict[str, Any]) -> None:
    pair = Pair(device, (60, 40), **options)
    for seed in range(20):
        pair.step(seed, weighted=options.get("pooling") is not PoolingMode.NONE)
    pair.same()


def test_rows_stay_until_backward_even_when_others_need_slots(device: str) -> None:
    pair = Pair(device, (60, 40))
    first, second = pair.batch(1), pair.batch(2)
    out, wanted = pair.ours(*first), pair.stock(*first)
    held = pair.ours.rows.cache.pinned_slots
    assert held > 0
    pair.ours.prefetch(*second)
    out.sum().backward()
    wanted.sum().backward()
    assert torch.equal(pair.ours(*second), pair.stock(*second))


def test_pins_end_with_the_graph(device: str) -> None:
    pair = Pair(device, (60, 40))
    out = pair.ours(*pair.batch(1))
    assert pair.ours.rows.cache.pinned_slots > 0
    del out
    gc.collect()
    with torch.no_grad():
        pair.ours(*pair.batch(2))
    assert pair.ours.rows.cache.pinned_slots == 0
    if isinstance(pair.ours.rows, CachedRows):
        # A GPU marks rows when it looks them up.
        assert not pair.ours.rows.cache.dirty(0)[0].numel()


def test_a_second_backward_is_refused(device: str) -> None:
    pair = Pair(device, (60, 40))
    out = pair.ours(*pair.batch(1))
    out.sum().backward(retain_graph=True)
    with pytest.raises(CacheFullError, match="run forward again"):
        out.sum().backward()


def test_two_forwards_then_two_backwards(device: str) -> None:
    pair = Pair(device, (110, 80))
    batches = [pair.batch(1), pair.batch(2)]
    for module in (pair.ours, pair.stock):
        outs = [module(*b) for b in batches]
        for out in outs:
            out.sum().backward()
    pair.same()


def test_counts_are_exact(device: str) -> None:
    pair = Pair(device, (300, 300))
    pair.ours(pair.tensor(1, 1, 2, 1, 7, 7), pair.tensor(0, 3, 4, 6)).sum().backward()
    pair.ours(pair.tensor(2, 3, 7), pair.tensor(0, 1, 2, 3)).sum().backward()
    reads = pair.ours.rows.counters.read()
    assert (reads["a"].read_hit_count, reads["a"].read_miss_count) == (3, 3)
    assert (reads["b"].read_hit_count, reads["b"].read_miss_count) == (2, 1)


BAD = {
    "float ids": (torch.tensor([1.0]), torch.tensor([0, 1, 1, 1]), InputError, "int32 or int64"),
    "2-D ids": (torch.tensor([[1]]), torch.tensor([0, 1, 1, 1]), InputError, "1-D"),
    "negative id": (torch.tensor([-1]), torch.tensor([0, 1, 1, 1]), RowIndexError, "got id -1"),
    "large id": (torch.tensor([500]), torch.tensor([0, 1, 1, 1]), RowIndexError, "rows 0 to 499, got id 500"),
    "large for table b": (torch.tensor([300]), torch.tensor([0, 0, 0, 1]), RowIndexError, "'b'"),
    "offsets end early": (torch.tensor([1, 2]), torch.tensor([0, 1, 1, 1]), InputError, "rise from 0"),
    "offsets fall": (torch.tensor([1, 2]), torch.tensor([0, 2, 1, 2]), InputError, "falling"),
    "offsets start late": (torch.tensor([1, 2]), torch.tensor([1, 2, 2, 2]), InputError, "rise from 0"),
    "offsets of two features": (torch.tensor([1, 2]), torch.tensor([0, 1, 2]), InputError, "3 features"),
    "no offsets": (torch.tensor([1]), torch.empty(0, dtype=torch.int64), InputError, "3 features"),
    "ids in an empty batch": (torch.tensor([1]), torch.tensor([0]), InputError, "empty batch"),
    "meta device": (torch.empty(1, dtype=torch.int64, device="meta"), torch.tensor([0, 1, 1, 1]), InputError, "meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_batches_change_nothing(device: str, case: str) -> None:
    ids, offsets, error, said = BAD[case]
    ids, offsets = ids if ids.is_meta else ids.to(device), offsets.to(device)
    pair = Pair(device, (20, 20))
    with pytest.raises(error, match=said):
        pair.ours(ids, offsets)
    assert pair.ours.rows.counters.take() == (0, 0, 0)
    assert not pair.ours.rows.cache.resident(0)[0].numel()
    pair.ours.rows.cache.check()


def test_bounds_modes_answer_with_row_zero(device: str) -> None:
    pair = Pair(device, (20, 20))
    pair.ours.rows.layout.bounds = Bounds.WARN
    given = pair.tensor(700, 3)
    with pytest.warns(RuntimeWarning, match="row 0 answers"):
        out = pair.ours(given, pair.tensor(0, 1, 2, 2))
    assert torch.equal(out, pair.stock(pair.tensor(0, 3), pair.tensor(0, 1, 2, 2)))
    assert given.tolist() == [700, 3]


def test_other_refusals(device: str) -> None:
    pair = Pair(device, (20, 20))
    ids, offsets = pair.batch(1)
    with pytest.raises(InputError, match="per_sample_weights"):
        pair.ours(ids, offsets, torch.ones(ids.numel() + 1, device=device))
    with pytest.raises(UnsupportedError, match="batch size"):
        pair.ours(ids, offsets, batch_size_per_feature_per_rank=[[1]])
    with pytest.raises(UnsupportedError, match="ADAM"):
        row_state(EmbOptimType.ADAM, torch.device("cpu"))
    with pytest.raises(ConfigError, match="slots must be 1 to 500, got 0"):
        Pair(device, (0, 20))
    with pytest.raises(ConfigError, match="ascending"):
        TurboSSDTableBatchedEmbeddingBags(shards_of(EmbOptimType.EXACT_SGD), (9, 9), (0, 1, 0), pair.store)
    pair.ours.close()
    with pytest.raises(ClosedError):
        pair.ours(ids, offsets)


def test_a_store_that_fails_loses_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(device, (60, 40))
    for seed in range(5):
        pair.step(seed)

    def full(batch: Any) -> None:
        raise StoreFullError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(pair.store, "write", full)
        with pytest.raises(StoreFullError):
            for seed in range(5, 30):
                pair.ours(*pair.batch(seed))
    pair.ours.rows.cache.check()
    gc.collect()
    for seed in range(5, 10):
        pair.step(seed)
    pair.same()


def test_writes_reach_rows_wherever_they_are(device: str) -> None:
    pair = Pair(device, (20, 20), EmbOptimType.EXACT_SGD)
    pair.ours(pair.tensor(3), pair.tensor(0, 1, 1, 1)).sum().backward()
    size = weight_bytes(8, SparseType.FP32)
    rows = torch.full((2, size), 7, dtype=torch.uint8)
    pair.ours.write_rows(0, torch.tensor([3, 400]), rows)
    assert torch.equal(pair.ours.read_rows(0, torch.tensor([400, 3])), rows)
    pair.ours.flush()
    assert torch.equal(pair.store.read("a", torch.tensor([3, 400]))[0], rows)


def test_a_forward_that_fails_holds_no_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(device, (60, 40))

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(pair.ours, "_call", fail)
        with pytest.raises(torch.OutOfMemoryError):
            pair.ours(*pair.batch(1))
    assert pair.ours.rows.cache.pinned_slots == 0
    pair.step(1)
    pair.same()


@pytest.mark.parametrize("slots", [(3, 3), (110, 80)], ids=["outside", "inside"])
def test_changed_hyper_parameters_and_the_step_count_are_stocks(device: str, slots: tuple[int, int]) -> None:
    pair = Pair(device, slots)
    for seed, rate in enumerate((0.5, 0.01, 0.2)):
        for module, stock in ((pair.ours, pair.ours.tbe), (pair.stock, pair.stock)):
            module.set_learning_rate(rate)
            stock.update_hyper_parameters({"eps": rate})
        pair.step(seed)
    assert pair.ours.get_learning_rate() == pair.stock.get_learning_rate()
    assert int(pair.ours.tbe.iter) == int(pair.stock.iter) == 3
    pair.same()


def test_a_row_that_was_only_read_is_written_back_after_an_update(device: str) -> None:
    pair = Pair(device, (20, 20), EmbOptimType.EXACT_SGD)
    with torch.no_grad():
        pair.ours(pair.tensor(3), pair.tensor(0, 1, 1, 1))
    rows = torch.full((1, weight_bytes(8, SparseType.FP32)), 7, dtype=torch.uint8)
    pair.ours.write_rows(0, torch.tensor([3]), rows)
    pair.ours.flush()
    assert torch.equal(pair.store.read("a", torch.tensor([3]))[0], rows)


def test_flush_makes_the_store_durable(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(device, (60, 40))
    pair.ours(pair.tensor(3), pair.tensor(0, 1, 1, 1)).sum().backward()
    flushed: list[bool] = []

    def flush() -> None:
        flushed.extend(pair.store.read("a", torch.tensor([3]))[1].tolist())

    monkeypatch.setattr(pair.store, "flush", flush)
    pair.ours.flush()
    assert flushed == [True], "the store must be flushed once, after the trained row was written to it"


def test_slot_zero_is_zero(device: str) -> None:
    pair = Pair(device, (60, 40))
    for seed in range(3):
        pair.step(seed)
    assert not any(bool(weights[0].any()) for weights in pair.ours.tbe.split_embedding_weights())
