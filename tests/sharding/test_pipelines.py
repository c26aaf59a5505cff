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
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.streamable import Pipelineable

from tests.ranks import GPU_RANKS, run_ranks
from tests.sharding.models import FEATURES, Model, SequenceModel, batch, local_rows, make_dmp, optimizer_rows, sparse_of

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


class PipelinedSequences(SequenceModel):
    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        found = self.ec(batch.features)
        bags = [found[f].to_padded_dense(5).sum(1) for names in FEATURES.values() for f in names]
        predictions = self.linear(torch.cat(bags, dim=1))
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


def _by_hand(pipeline: Any, dmp: DistributedModelParallel, rank: int) -> list[Tensor]:
    """What TorchRec's prefetch pipeline does, which needs CUDA streams: the next batch comes before backward."""
    sparse = sparse_of(dmp)

    def distributed(step: int) -> tuple[Any, Any]:
        context = sparse.create_context()
        return context, sparse.input_dist(context, batch(step, rank)).wait().wait()

    sums = []
    held = distributed(0)
    sparse.prefetch(held[1], ctx=held[0])
    for step in range(STEPS):
        found = sparse.compute_and_output_dist(*held).wait()
        values = found.values() if isinstance(found, KeyedTensor) else torch.cat([f.values() for f in found.values()])
        held = distributed(step + 1)
        sparse.prefetch(held[1], ctx=held[0])
        if hasattr(sparse, "_kernels"):
            _check_waiting(sparse)
        (values * values).sum().backward()
        sums.append(values.detach())
    return sums


def _check_waiting(sparse: Any) -> None:
    """A batch of every kernel has been prefetched, and not been used yet."""
    if not all(len(kernel.emb_module._prefetched) == 1 for kernel in sparse._kernels()):
        raise AssertionError("a batch was not prefetched")


def _compare(rank: int, world: int, kind: str, made: type[Any], directory: Path) -> dict[str, float]:
    pipeline = PrefetchTrainPipelineSparseDist if kind == "prefetch" else TrainPipelineSparseDist
    run: Any = _by_hand if kind == "by-hand" else _run
    seen = []
    for where, slots in ((directory, SLOTS), (None, None)):
        dmp = make_dmp(world, "row_wise", EmbOptimType.EXACT_ROWWISE_ADAGRAD, where, slots, made())
        predictions = run(pipeline, dmp, rank)
        seen.append((predictions, local_rows(dmp.state_dict()), optimizer_rows(dmp), dmp))
    ours, stock = seen
    if not all(torch.equal(a, b) for a, b in zip(ours[0], stock[0], strict=True)):
        raise AssertionError("predictions differ")
    for mine, theirs in ((ours[1], stock[1]), (ours[2], stock[2])):
        for key, shards in theirs.items():
            if not all(torch.equal(a[1].flatten(), b[1].flatten()) for a, b in zip(shards, mine[key], strict=True)):
                raise AssertionError(f"{key} differs")
    ebc = sparse_of(ours[3])
    kernels: list[nn.Module] = list(ebc._kernels())
    for kernel in kernels:
        kernel.emb_module.rows.cache.check()
        kernel.emb_module._prefetched.end_all()
        if kernel.emb_module.rows.cache.pinned_slots:
            raise AssertionError("rows are held after the last step")
    rates = {name: reads.hit_rate for name, reads in ebc.read_stats().items()}
    ebc.close()
    return rates


@pytest.mark.parametrize("made", [PipelinedModel, PipelinedSequences])
@pytest.mark.parametrize(
    ("kind", "backend", "world"),
    [
        pytest.param("sparse-dist", "gloo", 2, id="sparse-dist-gloo"),
        pytest.param("by-hand", "gloo", 2, id="by-hand-gloo"),
        pytest.param("sparse-dist", "nccl", GPU_RANKS, marks=pytest.mark.gpu, id="sparse-dist-nccl"),
        pytest.param("prefetch", "nccl", GPU_RANKS, marks=pytest.mark.gpu, id="prefetch-nccl"),
    ],
)
def test_pipelines_train_as_with_fused_tables(
    tmp_path: Path, kind: str, backend: str, world: int, made: type[Any]
) -> None:
    for rates in run_ranks(world, _compare, kind, made, tmp_path, backend=backend):
        assert rates and all(0.0 < rate < 0.95 for rate in rates.values())
