"""Rows that were never written are not asked for."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from tests.store.store_kit import SIZES, batch_of, rows_of
from torchrec_turbossd.errors import ClosedError
from torchrec_turbossd.store import KnownRowsStore, MemoryRowStore

ROWS = {"users": 100, "items@0+4": 100}


class Asked(MemoryRowStore):
    """Remembers which ids it was asked for."""

    def __init__(self) -> None:
        super().__init__(SIZES)
        self.asked: list[int] = []

    def read(self, table: str, ids: torch.Tensor) -> Any:
        self.asked += ids.tolist()
        return super().read(table, ids)


def test_only_rows_that_may_be_there_are_asked_for() -> None:
    inner = Asked()
    store = KnownRowsStore(inner, ROWS, empty=True)
    rows, found = store.read("users", torch.tensor([3, 5, 3]))
    assert inner.asked == [] and not found.any() and not rows.any()
    store.write(batch_of([5, 99, 250]))
    rows, found = store.read("users", torch.tensor([3, 5, 99, 98, 250, 251]))
    # Ids beyond the table are not known about.
    assert inner.asked == [5, 99, 250, 251]
    assert found.tolist() == [False, True, True, False, True, False]
    assert torch.equal(rows[found], rows_of(torch.tensor([5, 99, 250]), SIZES["users"]))
    inner.asked.clear()
    store.read("items@0+4", torch.tensor([5, 99]))
    assert inner.asked == [5, 99]


def test_a_store_that_is_not_empty_is_asked_for_everything() -> None:
    inner = Asked()
    inner.write(batch_of([7]))
    store = KnownRowsStore(inner, ROWS, empty=False)
    _, found = store.read("users", torch.tensor([6, 7]))
    assert found.tolist() == [False, True] and inner.asked == [6, 7]


def test_a_closed_store_says_so_even_for_rows_it_cannot_hold() -> None:
    store = KnownRowsStore(MemoryRowStore(SIZES), ROWS, empty=True)
    store.close()
    with pytest.raises(ClosedError):
        store.read("users", torch.tensor([1]))


def test_writers_of_neighbouring_rows_lose_nothing() -> None:
    store = KnownRowsStore(MemoryRowStore(SIZES), {"users": 80_000, "items@0+4": 100}, empty=True)
    parts = [torch.arange(first, 80_000, 4) for first in range(4)]

    def write(ids: torch.Tensor) -> None:
        for part in ids.split(50):
            store.write({"users": (part, rows_of(part, SIZES["users"]))})

    threads = [threading.Thread(target=write, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bool(store.read("users", torch.arange(80_000))[1].all())
