"""The live row stores of a rank: where they are, how they are set, and what they never resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.types import KeyValueParams

from torchrec_turbossd.errors import ConfigError
from torchrec_turbossd.sharding.rank_store import RankStores, StoreOptions
from torchrec_turbossd.tables import TableShard, TableSpec


def test_no_directory_is_an_error() -> None:
    shard = TableShard.whole(TableSpec(name="t", rows=5, dim=4))
    with pytest.raises(ConfigError, match="ssd_directory"):
        RankStores(StoreOptions(), "ebc", (0, 0), [(shard, None)])


def test_each_table_may_name_its_ssd(tmp_path: Path) -> None:
    shards = [TableShard.whole(TableSpec(name=n, rows=5, dim=4)) for n in "ab"]
    own = KeyValueParams(ssd_storage_directory=str(tmp_path / "disk@local_rank"))
    options = StoreOptions(ssd_directory=tmp_path / "base")
    stores = RankStores(options, "m.ebc", (3, 1), [(shards[0], own), (shards[1], None)])
    assert (tmp_path / "disk1" / "rank_3" / "m.ebc").is_dir() and (tmp_path / "base" / "rank_3" / "m.ebc").is_dir()
    rows = torch.ones(1, 16, dtype=torch.uint8)
    stores.store.write({"a": (torch.tensor([2]), rows), "b": (torch.tensor([4]), rows)})
    assert torch.equal(stores.store.read("b", torch.tensor([4]))[0], rows)
    stores.close()


def test_live_rows_are_never_resumed(tmp_path: Path) -> None:
    shards: list[Any] = [(TableShard.whole(TableSpec(name="t", rows=5, dim=4)), None)]
    for _ in range(2):
        stores = RankStores(StoreOptions(ssd_directory=tmp_path), "ebc", (0, 0), shards)
        assert not stores.store.read("t", torch.tensor([2]))[1].any()
        stores.store.write({"t": (torch.tensor([2]), torch.ones(1, 16, dtype=torch.uint8))})
        stores.store.flush()
        stores.close()


def _shards(*given: KeyValueParams | None) -> list[Any]:
    return [(TableShard.whole(TableSpec(name=f"t{n}", rows=5, dim=4)), each) for n, each in enumerate(given)]


def test_key_value_params_reach_the_store(tmp_path: Path) -> None:
    small = KeyValueParams(l2_cache_size=1, ssd_rocksdb_write_buffer_size=100 << 20)
    large = KeyValueParams(l2_cache_size=3)
    stores = RankStores(StoreOptions(ssd_directory=tmp_path), "ebc", (0, 0), _shards(small, None, large))
    (settings,) = stores._settings.values()
    assert settings.block_cache_bytes == 3 << 30 and settings.write_buffer_bytes == 100 << 20
    stores.close()


def test_key_value_params_that_mean_nothing_here_are_named(tmp_path: Path) -> None:
    given = KeyValueParams(ssd_rocksdb_shards=4, enable_async_update=True, l2_cache_size=1)
    with pytest.warns(UserWarning, match="'t0': .* ssd_rocksdb_shards, enable_async_update have no meaning"):
        RankStores(StoreOptions(ssd_directory=tmp_path), "ebc", (0, 0), _shards(given)).close()


def test_threads_are_the_ranks_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(24)))
    assert StoreOptions().threads() == 8
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 24)
    for local, threads in (("1", 8), ("4", 6), ("24", 2)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert StoreOptions().threads() == threads
    assert StoreOptions(read_threads=3).threads() == 3
