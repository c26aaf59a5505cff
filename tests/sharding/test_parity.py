"""Training on SSD gives the numbers of TorchRec's FUSED kernel, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.modules.embedding_configs import PoolingType

from tests.ranks import GPU_RANKS, run_ranks
from tests.sharding.models import Model, local_rows, make_dmp, optimizer_rows, train

STEPS = 50
CACHES = {
    "barely the batch": {"big": 100, "wide": 50},
    "half": {"big": 300, "wide": 150},
    "whole": {"big": 900, "wide": 400},
}


def _compare(rank: int, world: int, sharding: str, optimizer: EmbOptimType, directory: Path) -> dict[str, Any]:
    reference = make_dmp(world, sharding, optimizer, None, None)
    wanted = train(reference, rank, range(STEPS))
    rows, state = local_rows(reference.state_dict()), optimizer_rows(reference)
    seen: dict[str, Any] = {}
    for label, slots in CACHES.items():
        dmp = make_dmp(world, sharding, optimizer, directory / label.replace(" ", "-"), slots)
        got = train(dmp, rank, range(STEPS))
        if not all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True)):
            raise AssertionError(f"{label}: predictions differ")
        _same(rows, local_rows(dmp.state_dict()), label)
        _same(state, optimizer_rows(dmp), label)
        seen[label] = {name: reads.hit_rate for name, reads in dmp.module.ebc.read_stats().items()}
        for kernel in dmp.module.ebc._kernels():
            kernel.emb_module.rows.cache.check()
        dmp.module.ebc.close()
    return seen


def _same(wanted: dict[str, Any], got: dict[str, Any], label: str) -> None:
    if wanted.keys() != got.keys():
        raise AssertionError(f"{label}: keys {sorted(got)} instead of {sorted(wanted)}")
    for key, shards in wanted.items():
        for (offset, rows), (other, mine) in zip(shards, got[key], strict=True):
            if offset != other or not torch.equal(rows.flatten(), mine.flatten()):
                raise AssertionError(f"{label}: {key} at {offset} differs")


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ROWWISE_ADAGRAD])
@pytest.mark.parametrize(
    ("sharding", "world"), [("table_wise", 1), ("table_wise", 2), ("row_wise", 2), ("row_wise", 1)]
)
def test_same_numbers_as_fused(tmp_path: Path, sharding: str, world: int, optimizer: EmbOptimType) -> None:
    by_rank = run_ranks(world, _compare, sharding, optimizer, tmp_path)
    rates = [rate for seen in by_rank for rate in seen["barely the batch"].values()]
    assert rates and all(0.0 < rate < 0.95 for rate in rates), "the small cache must have evicted"


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ROWWISE_ADAGRAD])
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_same_numbers_as_fused_on_cuda(tmp_path: Path, sharding: str, optimizer: EmbOptimType) -> None:
    by_rank = run_ranks(GPU_RANKS, _compare, sharding, optimizer, tmp_path, backend="nccl")
    assert all(0.0 < rate < 0.95 for seen in by_rank for rate in seen["barely the batch"].values())


def _compare_mean(rank: int, world: int, directory: Path) -> None:
    pooled = [Model(PoolingType.MEAN) for _ in range(2)]
    optimizer = EmbOptimType.EXACT_ROWWISE_ADAGRAD
    reference = make_dmp(world, "row_wise", optimizer, None, None, pooled[0])
    ours = make_dmp(world, "row_wise", optimizer, directory, CACHES["half"], pooled[1])
    wanted, got = (train(dmp, rank, range(10)) for dmp in (reference, ours))
    if not all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True)):
        raise AssertionError("predictions differ")
    _same(local_rows(reference.state_dict()), local_rows(ours.state_dict()), "mean")
    ours.module.ebc.close()


def test_means_over_row_shards_are_those_of_fused(tmp_path: Path) -> None:
    run_ranks(2, _compare_mean, tmp_path)
