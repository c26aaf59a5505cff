"""Training on SSD gives the numbers of TorchRec's FUSED kernel, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.modules.embedding_configs import PoolingType

from tests.ranks import GPU_RANKS, run_ranks
from tests.sharding.models import Model, SequenceModel, local_rows, make_dmp, optimizer_rows, sparse_of, train

STEPS = 50
OPTIMIZERS = (EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD)
CUDA_OPTIMIZERS = (
    *OPTIMIZERS,
    EmbOptimType.ADAM,
    EmbOptimType.PARTIAL_ROWWISE_ADAM,
    EmbOptimType.LAMB,
    EmbOptimType.PARTIAL_ROWWISE_LAMB,
)
CACHES = {
    "barely the batch": {"big": 100, "wide": 50},
    "half": {"big": 300, "wide": 150},
    "whole": {"big": 900, "wide": 400},
}


def _compare(
    rank: int, world: int, sharding: str, optimizer: EmbOptimType, directory: Path, made: type[Any]
) -> dict[str, Any]:
    reference = make_dmp(world, sharding, optimizer, None, None, made())
    wanted = train(reference, rank, range(STEPS))
    rows, state = local_rows(reference.state_dict()), optimizer_rows(reference)
    seen: dict[str, Any] = {}
    # Many processes on few cores are slow; the smallest cache is the one in which all can go wrong.
    only_smallest = world > 2 or (world == 2 and made is SequenceModel)
    for label, slots in list(CACHES.items())[: 1 if only_smallest else None]:
        dmp = make_dmp(world, sharding, optimizer, directory / label.replace(" ", "-"), slots, made())
        got = train(dmp, rank, range(STEPS))
        if not all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True)):
            raise AssertionError(f"{label}: predictions differ")
        _same(rows, local_rows(dmp.state_dict()), label)
        _same(state, optimizer_rows(dmp), label)
        seen[label] = {name: reads.hit_rate for name, reads in sparse_of(dmp).read_stats().items()}
        for kernel in sparse_of(dmp)._kernels():
            kernel.emb_module.rows.cache.check()
        sparse_of(dmp).close()
    return seen


def _same(wanted: dict[str, Any], got: dict[str, Any], label: str) -> None:
    if wanted.keys() != got.keys():
        raise AssertionError(f"{label}: keys {sorted(got)} instead of {sorted(wanted)}")
    for key, shards in wanted.items():
        for (offset, rows), (other, mine) in zip(shards, got[key], strict=True):
            if offset != other or not torch.equal(rows.flatten(), mine.flatten()):
                raise AssertionError(f"{label}: {key} at {offset} differs")


def _compare_all(rank: int, world: int, sharding: str, directory: Path, made: type[Any]) -> list[dict[str, float]]:
    """With each optimizer: the hit rates of the smallest cache."""
    optimizers = CUDA_OPTIMIZERS if dist.get_backend() == "nccl" else OPTIMIZERS
    return [
        _compare(rank, world, sharding, optimizer, directory / optimizer.name, made)["barely the batch"]
        for optimizer in optimizers
    ]


def _check_small_cache(by_rank: list[list[dict[str, float]]]) -> None:
    rates = [rate for by_optimizer in by_rank for seen in by_optimizer for rate in seen.values()]
    assert rates and all(0.0 < rate < 0.97 for rate in rates), "the small cache must have evicted"


@pytest.mark.parametrize("made", [Model, SequenceModel])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise"])
def test_same_numbers_as_fused(tmp_path: Path, sharding: str, world: int, made: type[Any]) -> None:
    _check_small_cache(run_ranks(world, _compare_all, sharding, tmp_path, made))


@pytest.mark.parametrize("sharding", ["table_row_wise", "table_column_wise", "grid_shard"])
def test_same_numbers_as_fused_on_two_hosts(tmp_path: Path, sharding: str) -> None:
    _check_small_cache(run_ranks(4, _compare_all, sharding, tmp_path, Model, local=2))


@pytest.mark.gpu
@pytest.mark.parametrize("made", [Model, SequenceModel])
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise"])
def test_same_numbers_as_fused_on_cuda(tmp_path: Path, sharding: str, made: type[Any]) -> None:
    _check_small_cache(run_ranks(GPU_RANKS, _compare_all, sharding, tmp_path, made, backend="nccl"))


@pytest.mark.gpu
@pytest.mark.parametrize("sharding", ["table_row_wise", "table_column_wise", "grid_shard"])
def test_other_sharding_types_on_cuda(tmp_path: Path, sharding: str) -> None:
    # One host: GRID has a single column shard of both ranks' rows there.
    _check_small_cache(run_ranks(GPU_RANKS, _compare_all, sharding, tmp_path, Model, backend="nccl"))


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
