"""Host memory that the row stores of a plan take on each rank, whatever tables are in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import KeyValueParams

from torchrec_turbossd.planner.kernel import TURBO_SSD
from torchrec_turbossd.planner.storage import store_options
from torchrec_turbossd.sizing.memory import store_bytes
from torchrec_turbossd.store.rocks_options import RocksOptions

Ints = npt.NDArray[np.int64]


@dataclass
class _Store:
    """One on each rank that has shards in it: its settings, and shards and rows by place of the rank."""

    options: RocksOptions
    shards: Ints
    rows: Ints


class StoreTally:
    """Adds up the stores of a plan: of each module, one on each rank for each SSD directory that its tables name.

    Args:
        ranks: all of them.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self._place = {rank: n for n, rank in enumerate(ranks)}
        self._stores: dict[tuple[str, str | None], _Store] = {}

    def add(
        self, module: str, given: KeyValueParams | None, compute_device: str, shards: Sequence[tuple[int, int]]
    ) -> None:
        """Count a table on SSD.

        Args:
            module: path of its module.
            given: its memory settings and its directory count.
            compute_device: says what `l2_cache_size` means.
            shards: (rank, rows) of each.
        """
        key = module, given.ssd_storage_directory if given is not None else None
        store = self._stores.get(key)
        if store is None:
            none = np.zeros(len(self._place), dtype=np.int64)
            store = self._stores[key] = _Store(RocksOptions(), none, none.copy())
        store.options = store_options(store.options, given, compute_device)
        places = [self._place[rank] for rank, _ in shards]
        np.add.at(store.shards, places, 1)
        np.add.at(store.rows, places, [rows for _, rows in shards])

    def bytes(self) -> dict[int, int]:
        """The most that they take together, by rank; ranks without a store are left out."""
        found: dict[int, int] = {}
        known: dict[tuple[Any, ...], int] = {}
        for store in self._stores.values():
            for rank, place in self._place.items():
                shards, rows = int(store.shards[place]), int(store.rows[place])
                if shards:
                    key = shards, rows, store.options
                    if key not in known:
                        known[key] = store_bytes(shards, rows, store.options)
                    found[rank] = found.get(rank, 0) + known[key]
        return found


def bytes_of_stores(plan: Iterable[ShardingOption], ranks: Iterable[int], compute_device: str) -> Mapping[int, int]:
    """The most host memory that the row stores of chosen options take, by rank that has one."""
    tally = StoreTally(ranks)
    for option in plan:
        if option.compute_kernel == TURBO_SSD:
            shards = [(shard.rank, int(shard.size[0])) for shard in option.shards]
            tally.add(option.module[0], option.key_value_params, compute_device, shards)
    return tally.bytes()


__all__ = ["StoreTally", "bytes_of_stores"]
