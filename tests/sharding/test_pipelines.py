"""TorchRec's training pipelines over tables on SSD give the numbers of FUSED ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from tests.ranks import GPU_RANKS, run_ranks
from tests.sharding.models import Model, batch, local_rows, make_dmp, optimizer_rows

STEPS = 14
SLOTS = {"big": 220, "wide": 110}


@dataclass
class Batch(Pipelineable):
    """Features as a pipeline moves them."""

    features: KeyedJaggedTensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(self.features.to(device, non_blocking))

    def record_stream(self, stream: Any) -> None:
        self.features.record_stream(stream)

    def pin_memory(self) -> Batch:
        return Batch(self.features.pin_memory())


class PipelinedModel(Model):
    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        predictions = self.linear(self.ebc(batch.features).values())
        return (predictions * predictions).mean() + predictions.mean(), predictions


def _optimizer(dmp: DistributedModelParallel) -> CombinedOptimizer:
    dense = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    return CombinedOptimizer(
        [dmp.fused_optimizer, KeyedOptimizerWrapper(dense, lambda params: torch.optim.SGD(params, lr=0.05))]
    )


def _batches(rank: int) -> Iterator[Batch]:
    return iter([Batch(batch(step, rank)) for step in range(STEPS)])


def _run(pipeline: type[Any], dmp: DistributedModelParallel, rank: int) -> list[Tensor]:
    made = pipeline(dmp, _optimizer(dmp), dmp.device)
    batches = _batches(rank)
    return [made.progress(batches).detach().cpu() for _ in range(STEPS)]


def _compare(rank: int, world: int, prefetch: bool, directory: Path) -> dict[str, float]:
    pipeline = PrefetchTrainPipelineSparseDist if prefetch else TrainPipelineSparseDist
    seen = []
    for where, slots in ((directory, SLOTS), (None, None)):
        dmp = make_dmp(world, "row_wise", EmbOptimType.EXACT_ROWWISE_ADAGRAD, where, slots, PipelinedModel())
        predictions = _run(pipeline, dmp, rank)
        seen.append((predictions, local_rows(dmp.state_dict()), optimizer_rows(dmp), dmp))
    ours, stock = seen
    if not all(torch.equal(a, b) for a, b in zip(ours[0], stock[0], strict=True)):
        raise AssertionError("predictions differ")
    for mine, theirs in ((ours[1], stock[1]), (ours[2], stock[2])):
        for key, shards in theirs.items():
            if not all(torch.equal(a[1].flatten(), b[1].flatten()) for a, b in zip(shards, mine[key], strict=True)):
                raise AssertionError(f"{key} differs")
    ebc = ours[3].module.ebc
    kernels: list[nn.Module] = list(ebc._kernels())
    for kernel in kernels:
        kernel.emb_module.rows.cache.check()
        if kernel.emb_module._prefetched or kernel.emb_module.rows.cache.pinned_slots:
            raise AssertionError("rows are held after the last step")
    rates = {name: reads.hit_rate for name, reads in ebc.read_stats().items()}
    ebc.close()
    return rates


@pytest.mark.parametrize(
    ("prefetch", "backend", "world"),
    [
        pytest.param(False, "gloo", 2, id="sparse-dist-gloo"),
        pytest.param(False, "nccl", GPU_RANKS, marks=pytest.mark.gpu, id="sparse-dist-nccl"),
        # TorchRec's prefetch pipeline needs CUDA streams.
        pytest.param(True, "nccl", GPU_RANKS, marks=pytest.mark.gpu, id="prefetch-nccl"),
    ],
)
def test_pipelines_train_as_with_fused_tables(tmp_path: Path, prefetch: bool, backend: str, world: int) -> None:
    for rates in run_ranks(world, _compare, prefetch, tmp_path, backend=backend):
        assert rates and all(0.0 < rate < 0.95 for rate in rates.values())
