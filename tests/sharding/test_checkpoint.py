"""What training saved, as a server finds it."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from tests.ranks import GPU_RANKS, run_ranks
from tests.sharding.models import (
    DIM,
    ROWS,
    SEED,
    Model,
    batch,
    fused_params,
    local_rows,
    make_dmp,
    make_plan,
    optimizer_rows,
    train,
)
from torchrec_turbossd.errors import (
    CacheFullError,
    ConfigError,
    CorruptError,
    SnapshotError,
    StoreError,
    StoreFullError,
    UnsupportedError,
)
from torchrec_turbossd.sharding import TurboSSDEmbeddingBagCollectionSharder, load_snapshot, save_snapshot
from torchrec_turbossd.sharding.checkpoint import _by_name, _RankPart
from torchrec_turbossd.snapshot import read_manifest, verify
from torchrec_turbossd.store import RocksRowStore
from torchrec_turbossd.tables import TableSpec

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
    for wrong, said in (
        ({"kind": "serving"}, "data_types"),
        ({"kind": "serving", "data_types": "int8"}, "SparseType.INT8"),
        ({"kind": "serving", "data_types": {"big": "int8"}}, "data_types\\['big'\\]"),
        ({"data_types": SparseType.INT8}, "training snapshot keeps"),
        ({"version": -1}, "0 or more"),
        ({"version": 1.5}, "0 or more"),
        ({"extra": {"x": torch.ones(1)}}, "extra\\['x'\\]"),
    ):
        with pytest.raises(ConfigError, match=said):
            save_snapshot(dmp, directory / "other", **wrong)
    served = save_snapshot(dmp, directory / "serving", kind="serving", data_types=SparseType.INT8)
    if (manifest.kind, manifest.version, manifest.extra["step"], served.kind) != ("training", 7, 10, "serving"):
        raise AssertionError(str(manifest))
    dmp.module.ebc.close()
    return rows


NCCL = pytest.param("table_wise", GPU_RANKS, "nccl", marks=pytest.mark.gpu)


@pytest.mark.parametrize(
    ("sharding", "world", "backend"),
    [("table_wise", 2, "gloo"), ("row_wise", 2, "gloo"), ("row_wise", 1, "gloo"), NCCL],
)
def test_snapshots_hold_what_was_trained(tmp_path: Path, sharding: str, world: int, backend: str) -> None:
    by_rank = run_ranks(world, _save, sharding, tmp_path, backend=backend)
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


def _first_run(rank: int, world: int, sharding: str, directory: Path) -> None:
    dmp = make_dmp(world, sharding, ADAGRAD, directory / "first", SLOTS)
    train(dmp, rank, range(10))
    save_snapshot(dmp, directory / "saved", extra={"step": 10})
    dmp.module.ebc.close()


def _full_disk(*args: Any) -> None:
    raise StoreFullError("planted")


def _second_run(rank: int, world: int, sharding: str, directory: Path) -> dict[str, Any]:
    """Weights and state after loading into a model that had trained on something else."""
    dmp = make_dmp(world, sharding, ADAGRAD, directory / f"second-{sharding}-{world}", {"big": 150, "small": 20})
    train(dmp, rank, range(50, 54))
    before = local_rows(dmp.state_dict())
    out = dmp.module.ebc(batch(1, rank).to(dmp.device)).values()
    if rank > 0:
        # One busy rank is enough to refuse, on all of them.
        out = None
        gc.collect()
    with pytest.raises((CacheFullError, SnapshotError), match="in flight"):
        load_snapshot(dmp, directory / "saved")
    del out
    gc.collect()
    with pytest.raises((CorruptError, SnapshotError)):
        load_snapshot(dmp, directory / "damaged")
    if any(
        not torch.equal(x[1], y[1])
        for k, v in before.items()
        for x, y in zip(v, local_rows(dmp.state_dict())[k], strict=True)
    ):
        raise AssertionError("a refused load changed rows")
    with pytest.MonkeyPatch.context() as patch:
        if rank == world - 1:
            patch.setattr("torchrec_turbossd.sharding.restore.merged_rows", _full_disk)
        with pytest.raises(StoreError, match="half loaded"):
            load_snapshot(dmp, directory / "saved")
    manifest = load_snapshot(dmp, directory / "saved")
    found = {**local_rows(dmp.state_dict()), **optimizer_rows(dmp), "step": manifest.extra["step"]}
    dmp.module.ebc.close()
    return found


def _stamps(path: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file with when it was last written, and its bytes."""
    return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in path.rglob("*") if f.is_file()}


def _assemble(by_rank: list[dict[str, Any]], suffix: str) -> Tensor:
    parts = [part for found in by_rank for key, value in found.items() if key.endswith(suffix) for part in value]
    return torch.cat([values for _, values in sorted(parts, key=lambda p: p[0])])


@pytest.mark.parametrize(
    ("backend", "first", "others"),
    [
        ("gloo", 2, [(1, "table_wise"), (2, "table_wise"), (1, "row_wise")]),
        pytest.param("nccl", GPU_RANKS, [(1, "table_wise")], marks=pytest.mark.gpu),
    ],
    ids=["gloo", "nccl"],
)
def test_training_goes_on_under_another_plan(
    tmp_path: Path, backend: str, first: int, others: list[tuple[int, str]]
) -> None:
    run_ranks(first, _first_run, "row_wise", tmp_path, backend=backend)
    shutil.copytree(tmp_path / "saved", tmp_path / "damaged")
    before = _stamps(tmp_path / "saved")
    sst = max((tmp_path / "damaged").rglob("*.sst"), key=lambda f: f.stat().st_size)
    sst.write_bytes(sst.read_bytes()[:-1] + b"?")
    reference = run_ranks(first, _reference, tmp_path, backend=backend)
    for world, sharding in others:
        found = run_ranks(world, _second_run, sharding, tmp_path, backend=backend)
        assert found[0]["step"] == 10
        for name in ROWS:
            for suffix in (f"{name}.weight", f"{name}.momentum1"):
                assert torch.equal(_assemble(found, suffix), _assemble(reference, suffix)), (sharding, world, suffix)
    assert _stamps(tmp_path / "saved") == before, "loading must not open the snapshot in place"


def _reference(rank: int, world: int, directory: Path) -> dict[str, Any]:
    dmp = make_dmp(world, "row_wise", ADAGRAD, None, None)
    train(dmp, rank, range(10))
    return {**local_rows(dmp.state_dict()), **optimizer_rows(dmp)}


def test_modules_that_share_a_table_name_are_refused() -> None:
    table = TableSpec(name="t", rows=9, dim=4)
    ranks = [_RankPart(tables={("user", "t"): table}), _RankPart(tables={("user", "t"): table, ("item", "u"): table})]
    assert list(_by_name(ranks)) == ["u", "t"]
    ranks[1].tables["item", "t"] = table
    with pytest.raises(UnsupportedError, match="'item' and 'user' both have a table 't'"):
        _by_name(ranks)


OTHERS: dict[str, tuple[str, EmbOptimType, int, str]] = {
    "kind": ("serving", ADAGRAD, SEED, "kind 'training'"),
    "optimizer": ("training", EmbOptimType.EXACT_SGD, SEED, "state is"),
    "rule": ("training", ADAGRAD, SEED + 1, "use the same seed"),
}


def _refused(rank: int, world: int, directory: Path) -> None:
    dmp = make_dmp(world, "table_wise", ADAGRAD, directory / "live", SLOTS)
    save_snapshot(dmp, directory / "training")
    save_snapshot(dmp, directory / "serving", kind="serving", data_types=SparseType.FP32)
    dmp.module.ebc.close()
    for case, (kind, optimizer, seed, said) in OTHERS.items():
        model, params = Model(), fused_params(optimizer)
        sharder = TurboSSDEmbeddingBagCollectionSharder(directory / case, params, seed=seed)
        plan = make_plan(model, sharder, world, "table_wise", SLOTS)
        other = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])
        before = local_rows(other.state_dict())
        with pytest.raises(SnapshotError, match=said):
            load_snapshot(other, directory / kind)
        after = local_rows(other.state_dict())
        if not all(torch.equal(x[1], y[1]) for key in before for x, y in zip(before[key], after[key], strict=True)):
            raise AssertionError(f"{case}: a refused load changed rows")
        other.module.ebc.close()


def test_snapshots_of_another_kind_optimizer_or_rule_are_refused(tmp_path: Path) -> None:
    run_ranks(1, _refused, tmp_path)
