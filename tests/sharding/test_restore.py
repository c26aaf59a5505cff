"""Loading a snapshot: by hard links where it can, whole or not at all, and not without space."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.ranks import run_ranks
from tests.sharding.models import ROWS, fused_params, make_dmp, sparse_of, train
from tests.sharding.plans import Cut, cuts, parameter, plan_of
from tests.sharding.shards import check_loaded, held
from torchrec_turbossd.errors import CorruptError, SnapshotError, StoreError, StoreFullError
from torchrec_turbossd.sharding import TurboSSDEmbeddingBagCollectionSharder, load_snapshot, save_snapshot

ADAGRAD = EmbOptimType.EXACT_ROWWISE_ADAGRAD
SLOTS = {"big": 120, "wide": 60}


def _files(directory: Path) -> dict[int, Path]:
    return {f.stat().st_ino: f for f in directory.rglob("*.sst")}


def _stamps(path: Path) -> dict[Path, tuple[int, bytes]]:
    return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in path.rglob("*") if f.is_file()}


def _by_links(rank: int, world: int, directory: Path) -> dict[str, Any]:
    first = make_dmp(world, "row_wise", ADAGRAD, directory / "first", SLOTS)
    train(first, rank, range(8))
    save_snapshot(first, directory / "saved")
    kept, before = held(first), _stamps(directory / "saved") if rank == 0 else {}
    same = make_dmp(world, "row_wise", ADAGRAD, directory / "same", SLOTS)
    train(same, rank, range(30, 33))
    load_snapshot(same, directory / "saved")
    seen = {"kept": kept, "loaded": held(same)}
    mine, theirs = _files(directory / "same" / f"rank_{rank}"), _files(directory / "saved")
    seen["linked"] = bool(mine) and set(mine) <= set(theirs)
    weights = [[p for n, p in dmp.named_parameters() if "linear" in n] for dmp in (first, same)]
    for ours, wanted in zip(weights[1], weights[0], strict=True):
        ours.data.copy_(wanted.data)
    # As it was taken, so that both go on with the rows of one moment.
    load_snapshot(first, directory / "saved")
    seen["goes on"] = all(
        torch.equal(a, b)
        for a, b in zip(train(first, rank, range(8, 20)), train(same, rank, range(8, 20)), strict=True)
    )
    sparse_of(same).flush()
    other = make_dmp(world, "row_wise", ADAGRAD, directory / "other", {"big": 120})
    load_snapshot(other, directory / "saved")
    seen["copied"] = held(other)
    seen["not linked"] = not set(_files(directory / "other")) & set(theirs)
    torch.distributed.barrier()
    seen["unchanged"] = rank > 0 or _stamps(directory / "saved") == before
    seen["nothing left"] = not [f for f in directory.rglob(".*") if f.is_dir()]
    for dmp in (first, same, other):
        sparse_of(dmp).close()
    return seen


def test_the_same_plan_loads_by_links(tmp_path: Path) -> None:
    by_rank = run_ranks(2, _by_links, tmp_path)
    for loaded in ("loaded", "copied"):
        check_loaded([seen["kept"] for seen in by_rank], [seen[loaded] for seen in by_rank], ROWS)
    for seen in by_rank:
        assert all(value for value in seen.values() if isinstance(value, bool)), seen


Usage = namedtuple("Usage", "total used free")


def _no_space(rank: int, world: int, directory: Path) -> None:
    dmp = make_dmp(world, "table_wise", ADAGRAD, directory / "live", SLOTS)
    train(dmp, rank, range(4))
    save_snapshot(dmp, directory / "saved")
    kept = held(dmp)
    other = make_dmp(world, "table_wise", ADAGRAD, directory / "other", {"big": 120})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 1 << 40, 100))
        # `small` is written row by row.
        with pytest.raises(StoreFullError, match=rf"{directory}/\S+: \d+ bytes are to be written .* 100 are free"):
            save_snapshot(dmp, directory / "again")
        patch.setattr(
            shutil, "disk_usage", lambda path: Usage(1 << 40, 1, 100 if str(path).endswith("ebc") else 1 << 39)
        )
        with pytest.raises(StoreError, match=f"half loaded .*no space left at {directory}/other/rank_0/ebc"):
            load_snapshot(other, directory / "saved")
        patch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 1 << 40, 100))
        # The store that can be linked; where it cannot, there is no room for a copy.
        patch.setattr(os, "link", _refuse_links)
        before = held(dmp)
        with pytest.raises(StoreFullError, match=f"copying to {directory}"):
            load_snapshot(dmp, directory / "saved")
    with pytest.MonkeyPatch.context() as patch:
        # After the clone that takes the live store's place.
        patch.setattr("torchrec_turbossd.sharding.restore.open_parts", _refuse_links)
        with pytest.raises(PermissionError, match="planted"):
            load_snapshot(dmp, directory / "saved")
    if not all(torch.equal(a.weights, b.weights) for a, b in zip(before, held(dmp), strict=True)):
        raise AssertionError("a refused load changed the model")
    if sorted(f.name for f in directory.iterdir()) != ["live", "other", "saved"] or list(directory.rglob(".*")):
        raise AssertionError("something is left behind")
    load_snapshot(other, directory / "saved")
    check_loaded([kept], [held(other)], ROWS)
    for each in (dmp, other):
        sparse_of(each).close()


def _refuse_links(*args: Any) -> None:
    raise PermissionError(1, "planted")


def test_space_is_asked_for_before_it_is_used(tmp_path: Path) -> None:
    run_ranks(1, _no_space, tmp_path)


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev,
    reason="needs a second file system",
)
def test_a_snapshot_on_another_file_system(tmp_path: Path) -> None:
    run_ranks(1, _elsewhere, tmp_path)


def _elsewhere(rank: int, world: int, directory: Path) -> None:
    away = Path("/dev/shm") / f"turbossd-test-{os.getpid()}"
    away.mkdir()
    dmp = make_dmp(world, "table_wise", ADAGRAD, directory / "live", {**SLOTS, "small": 9})
    try:
        train(dmp, rank, range(4))
        kept = held(dmp)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 1 << 40, 100))
            with pytest.raises(StoreFullError, match=f"no space left at {away}"):
                save_snapshot(dmp, away / "saved")
        save_snapshot(dmp, away / "saved")
        train(dmp, rank, range(4, 6))
        load_snapshot(dmp, away / "saved")
        check_loaded([kept], [held(dmp)], ROWS)
    finally:
        shutil.rmtree(away)
        sparse_of(dmp).close()


def _leftovers(rank: int, world: int, directory: Path) -> None:
    names = (".saved.0123456789ab.staging", ".saved.training", "..saved.training.0123456789ab.staging")
    kept = (".saved.1.0123456789ab.staging", ".other.0123456789ab.staging")
    stores = (".ebc.loaded", "..ebc.loaded.0123.tmp")
    for name in (*names, *kept, *(f"live/rank_0/{store}" for store in stores)):
        (directory / name).mkdir(parents=True)
        (directory / name / "000001.sst").touch()
    dmp = make_dmp(world, "table_wise", ADAGRAD, directory / "live", SLOTS)
    save_snapshot(dmp, directory / "saved", kind="serving", data_types=SparseType.FP32)
    sparse_of(dmp).close()
    left = sorted(f.name for f in directory.iterdir() if f.name.startswith("."))
    if left != sorted(kept) or [f.name for f in (directory / "live" / "rank_0").iterdir()] != ["ebc"]:
        raise AssertionError(f"{left}")


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    run_ranks(1, _leftovers, tmp_path)


def _flipped(rank: int, world: int, directory: Path) -> None:
    dmp = make_dmp(world, "row_wise", ADAGRAD, directory / "live", SLOTS)
    train(dmp, rank, range(4))
    manifest = save_snapshot(dmp, directory / "saved")
    train(dmp, rank, range(4, 6))
    before = held(dmp)
    for part in manifest.parts:
        # In the middle of a row, where nobody looks when a store is opened.
        file = max((directory / "saved" / part.directory).glob("*.sst"), key=lambda f: f.stat().st_size)
        whole = file.read_bytes()
        torch.distributed.barrier()
        if rank == 0:
            file.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
        torch.distributed.barrier()
        with pytest.raises((CorruptError, SnapshotError), match="does not match its digest"):
            load_snapshot(dmp, directory / "saved")
        torch.distributed.barrier()
        if rank == 0:
            file.write_bytes(whole)
    if len(manifest.parts) < 3 or not all(
        torch.equal(a.weights, b.weights) for a, b in zip(before, held(dmp), strict=True)
    ):
        raise AssertionError("a refused load changed the model")
    torch.distributed.barrier()
    load_snapshot(dmp, directory / "saved")
    sparse_of(dmp).close()


def test_a_flipped_bit_in_any_part_is_found_by_some_rank(tmp_path: Path) -> None:
    run_ranks(2, _flipped, tmp_path)


def _one_table(directory: Path, rows: int, shards: list[Cut], slots: int | None) -> DistributedModelParallel:
    model = torch.nn.Module()
    config = EmbeddingBagConfig(name="t", num_embeddings=rows, embedding_dim=WIDTH, feature_names=["f"])
    model.ebc = EmbeddingBagCollection(device=torch.device("meta"), tables=[config])
    sharder = TurboSSDEmbeddingBagCollectionSharder(directory, fused_params(ADAGRAD))
    plan = ShardingPlan({"ebc": plan_of({"t": parameter("row_wise", shards, slots)})})
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])


def _fewer_rows_than_ranks(rank: int, world: int, directory: Path) -> None:
    shards = cuts("row_wise", 1, WIDTH, world, world, 0)
    dmp = _one_table(directory / "live", 1, shards, None)
    for value in (1.0, 2.0):
        # By hand, because FBGEMM cannot look up in a table without rows on a CPU.
        for local in sparse_of(dmp)._local():
            if local.shard.rows:
                local.write(torch.zeros(1).long(), torch.full((1, WIDTH + 1), value).view(torch.uint8))
        if value == 1.0:
            save_snapshot(dmp, directory / "saved")
            kept = [h.weights.clone() for h in held(dmp)]
    load_snapshot(dmp, directory / "saved")
    if not all(torch.equal(a, h.weights) for a, h in zip(kept, held(dmp), strict=True)):
        raise AssertionError("the row is another")
    sparse_of(dmp).close()


def test_ranks_without_rows(tmp_path: Path) -> None:
    run_ranks(2, _fewer_rows_than_ranks, tmp_path)


MANY, WIDTH = 5_000_000, 16


def _touched(rank: int, world: int, directory: Path) -> list[tuple[int, int]]:
    """Bytes of the snapshot and of the live store after 1 % and 2 % of a table's rows were trained."""
    dmp = _one_table(directory / "live", MANY, cuts("row_wise", MANY, WIDTH, 1, 1, 0), 20_000)
    order = torch.randperm(MANY, generator=torch.Generator().manual_seed(1))[: MANY // 50]
    seen = []
    for half in order.chunk(2):
        for ids in half.split(10_000):
            batch = KeyedJaggedTensor(keys=["f"], values=ids, lengths=torch.ones(ids.numel(), dtype=torch.int64))
            dmp.module.ebc(batch).values().sum().backward()
        path = directory / f"saved-{len(seen)}"
        save_snapshot(dmp, path)
        seen.append((_bytes(path), _bytes(directory / "live")))
    sparse_of(dmp).close()
    return seen


def _bytes(path: Path) -> int:
    return sum(f.stat().st_blocks * 512 for f in path.rglob("*") if f.is_file())


def test_disk_is_used_for_rows_that_were_trained(tmp_path: Path) -> None:
    (seen,) = run_ranks(1, _touched, tmp_path)
    for share, sizes in zip((100, 50), seen, strict=True):
        rows = MANY // share * (WIDTH * 4 + 4)
        assert all(rows <= size <= 1.5 * rows + (1 << 20) for size in sizes), (share, rows, sizes)
