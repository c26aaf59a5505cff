"""What training saved, as a server finds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torch import Tensor

from tests.ranks import run_ranks
from tests.sharding.models import DIM, ROWS, local_rows, make_dmp, train
from torchrec_turbossd.errors import ConfigError, SnapshotError
from torchrec_turbossd.sharding import save_snapshot
from torchrec_turbossd.snapshot import read_manifest, verify
from torchrec_turbossd.store import RocksRowStore

ADAGRAD = EmbOptimType.EXACT_ROWWISE_ADAGRAD
SLOTS = {"big": 120, "wide": 60}


def _save(rank: int, world: int, sharding: str, directory: Path) -> dict[str, list[tuple[tuple[int, ...], Tensor]]]:
    dmp = make_dmp(world, sharding, ADAGRAD, directory / "live", SLOTS)
    train(dmp, rank, range(10))
    manifest = save_snapshot(dmp, directory / "training", version=7, extra={"step": 10})
    rows = local_rows(dmp.state_dict())
    train(dmp, rank, range(10, 12))
    with pytest.raises(SnapshotError, match="not empty"):
        save_snapshot(dmp, directory / "training")
    with pytest.raises(ConfigError, match="kind"):
        save_snapshot(dmp, directory / "other", kind="weights")
    with pytest.raises(ConfigError, match="data_types"):
        save_snapshot(dmp, directory / "other", kind="serving")
    served = save_snapshot(dmp, directory / "serving", kind="serving", data_types=SparseType.INT8)
    if (manifest.kind, manifest.version, manifest.extra["step"], served.kind) != ("training", 7, 10, "serving"):
        raise AssertionError(str(manifest))
    dmp.module.ebc.close()
    return rows


@pytest.mark.parametrize(("sharding", "world"), [("table_wise", 2), ("row_wise", 2), ("row_wise", 1)])
def test_snapshots_hold_what_was_trained(tmp_path: Path, sharding: str, world: int) -> None:
    by_rank = run_ranks(world, _save, sharding, tmp_path)
    manifest = verify(tmp_path / "training")
    assert {t.name: (t.rows, t.dim) for t in manifest.tables} == {
        "big": (ROWS["big"], DIM), "wide": (ROWS["wide"], 2 * DIM), "small": (ROWS["small"], DIM)
    }  # fmt: skip
    seen = 0
    for part in manifest.parts:
        for key, shard in part.shards.items():
            table = manifest.table(shard.table)
            store = RocksRowStore(tmp_path / "training" / part.directory, {key: table.row_bytes}, create=False)
            for ids, rows in store.scan(key):
                weights = rows[:, : 4 * table.dim].contiguous().view(torch.float32)
                wanted = torch.empty(table.rows, table.dim)
                for shards in by_rank:
                    for offset, values in shards.get(f"ebc.embedding_bags.{table.name}.weight", []):
                        wanted[offset[0] : offset[0] + values.shape[0]] = values
                assert torch.equal(weights, wanted[ids])
                seen += ids.numel()
            store.close()
    assert seen > 300
    assert read_manifest(tmp_path / "serving").kind == "serving"
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")], "staging is left behind"
