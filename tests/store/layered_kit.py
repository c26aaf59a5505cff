"""Looking into layered stores."""

from __future__ import annotations

import threading

import torch

from tests.store.store_kit import SIZES, layered, rows_of
from torchrec_turbossd.store import LayeredRowStore


def salts(store: LayeredRowStore, ids: list[int], table: str = "users") -> list[int | None]:
    """The salt of each row, None where there is none."""
    index = torch.tensor(ids)
    rows, found = store.read(table, index)
    # The first byte of a row is 31 * id + 101 * salt modulo 251.
    known = ((rows[:, 0].long() - 31 * index) * pow(101, -1, 251)) % 251
    for salt in known[found].unique():
        some = found & (known == salt)
        assert torch.equal(rows[some], rows_of(index[some], SIZES[table], int(salt)))
    return [int(salt) if there else None for salt, there in zip(known, found, strict=True)]


def applied(store: LayeredRowStore) -> LayeredRowStore:
    """The store, after its background thread has done everything."""
    store._memory._drain()
    return store


def reopened(store: LayeredRowStore) -> LayeredRowStore:
    """The store, opened again without having applied anything more, as after a crash."""
    store.discard()
    return layered(store.path, create=False)


def held_back(store: LayeredRowStore) -> threading.Event:
    """Nothing is applied until the event is set."""
    go = threading.Event()
    real = store._disk.write
    store._disk.write = lambda batch: (go.wait(20), real(batch))[1]  # type: ignore[method-assign,func-returns-value]
    return go
