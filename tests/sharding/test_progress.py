"""Step counts and learning rates of fused optimizers go with a snapshot, table by table, under any plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed import DistributedModelParallel

from tests.ranks import GPU_RANKS, run_ranks
from tests.sharding.models import make_dmp, sparse_of, train
from tests.sharding.shards import held
from torchrec_turbossd.errors import SnapshotError
from torchrec_turbossd.sharding import load_snapshot, save_snapshot
from torchrec_turbossd.sharding.progress import fused_kernels
from torchrec_turbossd.snapshot import MANIFEST_FILE, OptimizerProgress, read_manifest
from torchrec_turbossd.snapshot.manifest import _digest

ADAGRAD = EmbOptimType.EXACT_ROWWISE_ADAGRAD
SLOTS = {"big": 120, "wide": 60}


def _goes_on(rank: int, world: int, optimizer: EmbOptimType, directory: Path) -> None:
    first = make_dmp(world, "row_wise", optimizer, directory / "first", SLOTS)
    train(first, rank, range(6))
    manifest = save_snapshot(first, directory / "saved")
    if optimizer is not ADAGRAD and any(progress.iter != 6 for progress in manifest.optimizer.values()):
        raise AssertionError(f"{manifest.optimizer}")
    other = make_dmp(world, "row_wise", optimizer, directory / "other", {"big": 120})
    train(other, rank, range(30, 32))
    load_snapshot(other, directory / "saved")
    weights = [[p for n, p in dmp.named_parameters() if "linear" in n] for dmp in (first, other)]
    for theirs, ours in zip(*weights, strict=True):
        ours.data.copy_(theirs.data)
    seen = [train(dmp, rank, range(6, 12)) for dmp in (first, other)]
    if not all(torch.equal(a, b) for a, b in zip(*seen, strict=True)):
        raise AssertionError("training went on otherwise")
    for dmp in (first, other):
        sparse_of(dmp).close()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "optimizer",
    [ADAGRAD, EmbOptimType.ADAM, EmbOptimType.PARTIAL_ROWWISE_ADAM, EmbOptimType.LAMB],
    ids=lambda optimizer: optimizer.name,
)
def test_optimizers_that_count_steps_go_on(optimizer: EmbOptimType, tmp_path: Path) -> None:
    run_ranks(GPU_RANKS, _goes_on, optimizer, tmp_path, backend="nccl")


AT = {"big": (70, 0.5, 0.25), "wide": (70, 0.5, 0.25), "small": (9, 0.125, 0.125)}
"""Step, learning rate and next learning rate."""


def _kernels(dmp: DistributedModelParallel) -> list[Any]:
    return list(fused_kernels(sparse_of(dmp)._lookups))


def _stock(kernel: Any) -> Any:
    return getattr(kernel.emb_module, "tbe", kernel.emb_module)


def _progress(dmp: DistributedModelParallel) -> dict[str, tuple[float, ...]]:
    """By table: both step counts of FBGEMM, its learning rate, and TorchRec's."""
    found = {}
    for kernel in _kernels(dmp):
        tbe = _stock(kernel)
        rate = kernel.fused_optimizer.param_groups[0]["lr"]
        for table in kernel.config.embedding_tables:
            found[table.name] = (int(tbe.iter), int(tbe.iter_cpu), tbe.get_learning_rate(), rate)
    return found


def _save_at(rank: int, world: int, sharding: str, directory: Path) -> None:
    dmp = make_dmp(world, sharding, ADAGRAD, directory / "live", SLOTS)
    train(dmp, rank, range(2))
    for kernel in _kernels(dmp):
        step, rate, following = AT[kernel.config.embedding_tables[0].name]
        kernel.fused_optimizer.param_groups[0]["lr"] = rate
        kernel.fused_optimizer.zero_grad()
        kernel.fused_optimizer.param_groups[0]["lr"] = following
        for counter in (_stock(kernel).iter, _stock(kernel).iter_cpu):
            counter.fill_(step)
    manifest = save_snapshot(dmp, directory / "saved")
    wanted = {n: OptimizerProgress(iter=s, learning_rate=r, next_learning_rate=f) for n, (s, r, f) in AT.items()}
    if manifest.optimizer != wanted or read_manifest(directory / "saved").optimizer != wanted:
        raise AssertionError(f"{manifest.optimizer}")
    sparse_of(dmp).close()


def _load_at(rank: int, world: int, sharding: str, slots: dict[str, int], directory: Path) -> dict[str, Any]:
    dmp = make_dmp(world, sharding, ADAGRAD, directory / "other", slots)
    train(dmp, rank, range(3))
    load_snapshot(dmp, directory / "saved")
    found, groups = _progress(dmp), [group["lr"] for group in dmp.fused_optimizer.param_groups]
    if sorted(groups) != sorted(kernel.fused_optimizer.param_groups[0]["lr"] for kernel in _kernels(dmp)):
        raise AssertionError(f"{groups}")
    dmp.fused_optimizer.zero_grad()
    if any(rate != following for _, _, rate, following in _progress(dmp).values()):
        raise AssertionError("a stale rate was pushed")
    sparse_of(dmp).close()
    return found


def test_steps_and_learning_rates_survive_another_plan(tmp_path: Path) -> None:
    run_ranks(2, _save_at, "row_wise", tmp_path)
    wanted = {name: (step, step, rate, following) for name, (step, rate, following) in AT.items()}
    # Another number of ranks, and `small` on SSD, `wide` in memory.
    for world, sharding, slots in ((1, "column_wise", SLOTS), (2, "table_wise", {"big": 99, "small": 9})):
        found: dict[str, Any] = {}
        for shards in run_ranks(world, _load_at, sharding, slots, tmp_path):
            found |= shards
        assert found == wanted


def _edit(path: Path, **changes: Any) -> None:
    """Change a manifest, with a digest that fits."""
    body = json.loads((path / MANIFEST_FILE).read_text())
    body |= changes
    body.pop("digest")
    (path / MANIFEST_FILE).write_text(json.dumps({**body, "digest": _digest(body)}))


def _older(rank: int, world: int, directory: Path) -> None:
    first = make_dmp(world, "table_wise", ADAGRAD, directory / "first", SLOTS)
    train(first, rank, range(4))
    saved = save_snapshot(first, directory / "saved", extra={"learning_rates": {"ebc/0": 0.1}})
    sparse_of(first).close()
    other = make_dmp(world, "table_wise", ADAGRAD, directory / "other", {**SLOTS, "small": 9})
    for kernel in _kernels(other):
        kernel.fused_optimizer.param_groups[0]["lr"] = 0.75
    other.fused_optimizer.zero_grad()
    before, rows = _progress(other), held(other)
    optimizer = {name: vars(progress) for name, progress in saved.optimizer.items()}
    _edit(directory / "saved", optimizer={**optimizer, "wide": {**optimizer["wide"], "iter": 3}})
    with pytest.raises(SnapshotError, match=r"'wide' at step 3 with learning rate 0\.1"):
        load_snapshot(other, directory / "saved")
    _edit(directory / "saved", optimizer={**optimizer, "small": {**optimizer["small"], "next_learning_rate": 7.0}})
    with pytest.raises(SnapshotError, match=r"'small' at step \d+ with learning rate 0.1\S*, next 7.0"):
        load_snapshot(other, directory / "saved")
    after = held(other)
    if before != _progress(other) or not all(
        torch.equal(a.weights, b.weights) for a, b in zip(rows, after, strict=True)
    ):
        raise AssertionError("a refused load changed the model")
    # As 0.1.0 wrote it.
    body = json.loads((directory / "saved" / MANIFEST_FILE).read_text())
    del body["optimizer"], body["digest"]
    body["format_version"] = 1
    (directory / "saved" / MANIFEST_FILE).write_text(json.dumps({**body, "digest": _digest(body)}))
    if load_snapshot(other, directory / "saved").extra["learning_rates"] != {"ebc/0": 0.1}:
        raise AssertionError("extra is the writer's own")
    if before != _progress(other):
        raise AssertionError("a snapshot without steps and rates leaves them alone")
    sparse_of(other).close()


def test_groups_that_disagree_and_snapshots_of_0_1_0(tmp_path: Path) -> None:
    run_ranks(1, _older, tmp_path)


def _rates_apart(rank: int, world: int, directory: Path) -> None:
    dmp = make_dmp(world, "row_wise", ADAGRAD, directory / "live", SLOTS)
    for kernel in _kernels(dmp):
        kernel.fused_optimizer.param_groups[0]["lr"] = 0.1 * (rank + 1)
    with pytest.raises(SnapshotError, match="'big' are not at one step and learning rate"):
        save_snapshot(dmp, directory / "saved")
    torch.distributed.barrier()
    if [f.name for f in directory.iterdir()] != ["live"]:
        raise AssertionError("a refused save left something behind")
    sparse_of(dmp).close()


def test_ranks_that_train_at_other_rates_are_told(tmp_path: Path) -> None:
    run_ranks(2, _rates_apart, tmp_path)
