"""Batches with more distinct rows than there are slots run outside them, with the same numbers."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest
import torch

from tests.tbe.pair import Pair
from torchrec_turbossd.errors import CacheFullError
from torchrec_turbossd.tbe.slot_memory import TrainingMemory

DIM_BYTES = 8 * 4 + 4
"""Of a row of the first table: weights, and row-wise state."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a batch did not fit")
        yield


def test_a_batch_larger_than_the_cache_is_right_and_warns_once(device: str) -> None:
    pair = Pair(device, (3, 3))
    with pytest.warns(RuntimeWarning, match="raise the cache budget") as caught:
        for seed in range(5):
            pair.step(seed)
    assert sum(issubclass(w.category, RuntimeWarning) for w in caught) == 1
    pair.same()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("slots", [(5, 5), (60, 40), (110, 80)])
def test_batches_in_flight_share_rows_in_slots_and_outside(
    device: str, slots: tuple[int, int], order: tuple[int, ...]
) -> None:
    pair = Pair(device, slots)
    large = torch.arange(90, device=device), pair.tensor(0, 90, 90, 90).long()
    batches = [pair.batch(1, size=1), large, pair.batch(1, size=1)]
    for module in (pair.ours, pair.stock):
        outs = [module(*batch) for batch in batches]
        if module is pair.ours:
            pair.ours.prefetch(*pair.batch(1))
        row, new = torch.tensor([3]), torch.full((1, DIM_BYTES), 7, dtype=torch.uint8)
        if module is pair.ours:
            pair.ours.write_rows(0, row, new)
        else:
            TrainingMemory(pair.stock).write(0, row, new)
        for number in order:
            (outs[number] * torch.arange(outs[number].shape[1], device=device)).sum().backward()
    assert torch.equal(pair.ours(*pair.batch(1)), pair.stock(*pair.batch(1)))
    with pytest.raises(CacheFullError, match="in flight"):
        pair.ours(*large).sum()
        held = pair.ours(*large)
        pair.ours.check_idle()
    del held
    pair.same()


def test_a_dropped_batch_outside_the_slots_is_no_obstacle(device: str) -> None:
    pair = Pair(device, (5, 5))
    out = pair.ours(*pair.batch(1))
    with pytest.raises(CacheFullError, match="1 more run outside"):
        pair.ours.forget()
    del out
    gc.collect()
    pair.ours.forget()


@pytest.mark.parametrize("backward", [True, False])
def test_a_batch_beyond_the_slots_sees_what_was_trained_in_them(device: str, backward: bool) -> None:
    pair = Pair(device, (60, 40))
    for seed in range(5):
        pair.step(seed)
    assert pair.ours.rows.cache.dirty(0)[0].numel() > 20
    large = torch.arange(90, device=device), torch.tensor([0, 45, 90, 90], device=device)
    with torch.set_grad_enabled(backward):
        mine, theirs = pair.ours(*large), pair.stock(*large)
    assert torch.equal(mine, theirs)
    for out in (mine, theirs) if backward else ():
        out.sum().backward()
    pair.step(5)
    pair.same()


def test_counts_are_exact_when_one_table_of_a_batch_does_not_fit(device: str) -> None:
    pair = Pair(device, (50, 4))
    ids = torch.cat([torch.arange(5), torch.arange(9)]).to(device)
    pair.ours(ids, pair.tensor(0, 5, 5, 14)).sum().backward()
    reads = pair.ours.rows.counters.read()
    assert (reads["a"].read_hit_count, reads["a"].read_miss_count) == (0, 5)
    assert (reads["b"].read_hit_count, reads["b"].read_miss_count) == (0, 9)
    assert not pair.ours.rows.cache.resident(0)[0].numel(), "no table may admit rows of a batch that runs outside"
