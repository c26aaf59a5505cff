"""A table far larger than its memory, trained: how fast it opens, what disk it uses, and whether its rows are right.

`python -m benchmarks.big_table` trains 50 million rows x 64 in 1 GiB of fast memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

from benchmarks.streams import Zipf
from torchrec_turbossd.planner import turbo_ssd_planner
from torchrec_turbossd.rows import initial_weights
from torchrec_turbossd.sharding import get_turbo_ssd_sharders, save_snapshot
from torchrec_turbossd.tables import InitRule

_SEED, _ALPHA = 7, 1.05
_ROWWISE_ADAGRAD = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.05, "eps": 1e-6}


@dataclass(frozen=True, kw_only=True)
class Run:
    """rows, dim: of the table. cache_bytes: of fast memory. batch, length: bags a step, and ids of a bag."""

    rows: int
    dim: int
    cache_bytes: int
    steps: int
    batch: int = 4096
    length: int = 4


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to; sizes in bytes, times in seconds."""

    open_seconds: float
    slots: int
    fast_bytes: int
    step_seconds: float
    hit_rate: float
    touched: int
    disk_bytes: int
    snapshot_seconds: float
    most_memory: int

    def lines(self, run: Run) -> Iterator[str]:
        written, whole = (count * (4 * run.dim + 4) for count in (self.touched, run.rows))
        yield f"opens in {self.open_seconds:.2f} s, with {self.slots:,} slots in {self.fast_bytes / 2**20:,.0f} MiB"
        yield f"{run.steps} steps of {run.batch * run.length:,} lookups: {self.step_seconds * 1e3:.0f} ms each"
        yield f"{self.hit_rate:.1%} of lookups hit"
        yield (
            f"{self.touched:,} rows touched, {written / 2**20:,.0f} MiB; on disk {self.disk_bytes / 2**20:,.0f} MiB, "
            f"{self.disk_bytes / written:.2f} of that; all rows would be {whole / 2**20:,.0f} MiB"
        )
        yield f"snapshot in {self.snapshot_seconds:.1f} s; at most {self.most_memory / 2**20:,.0f} MiB of memory in use"
        yield "every touched row, weights and optimizer state, is bit-equal to FBGEMM's own training of those rows"


def train(run: Run, folder: Path) -> Result:
    """Train on SSD, then the rows that were touched once more in memory, and compare them."""
    rendezvous = (folder / "rendezvous").absolute()
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    try:
        start = time.perf_counter()
        model = _shard(run, folder / "live")
        opened = time.perf_counter() - start
        batches = _batches(run)
        start = time.perf_counter()
        for ids in batches:
            model(_features(run, ids))["f"].sum().backward()
        seconds = (time.perf_counter() - start) / run.steps
        return _judge(run, folder, model, batches, (opened, seconds))
    finally:
        dist.destroy_process_group()


def _shard(run: Run, live: Path) -> DistributedModelParallel:
    table = EmbeddingBagConfig(name="t", num_embeddings=run.rows, embedding_dim=run.dim, feature_names=["f"])
    plain = EmbeddingBagCollection(tables=[table], device=torch.device("meta"))
    sharders = get_turbo_ssd_sharders(live, _ROWWISE_ADAGRAD, seed=_SEED)
    topology = Topology(1, "cpu", ddr_cap=run.cache_bytes, ssd_cap=1 << 40, local_world_size=1)
    planner = turbo_ssd_planner(
        topology=topology, batch_size=run.batch, storage_reservation=FixedPercentageStorageReservation(0.0)
    )
    plan = planner.collective_plan(plain, sharders, dist.group.WORLD)
    return DistributedModelParallel(plain, device=torch.device("cpu"), plan=plan, sharders=sharders)


def _batches(run: Run) -> list[Tensor]:
    stream = Zipf(run.rows, _ALPHA, _SEED)
    return [torch.from_numpy(stream.draw(run.batch * run.length)) for _ in range(run.steps)]


def _features(run: Run, ids: Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(["f"], ids, lengths=torch.full((run.batch,), run.length))


def _judge(
    run: Run, folder: Path, model: DistributedModelParallel, batches: list[Tensor], seconds: tuple[float, float]
) -> Result:
    module: Any = model.module
    module.flush()
    disk = sum(f.stat().st_size for f in (folder / "live").rglob("*") if f.is_file())
    start = time.perf_counter()
    save_snapshot(model, folder / "snapshot")
    saved = time.perf_counter() - start
    touched, compact = torch.unique(torch.cat(batches), return_inverse=True)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    _compare(run, module, touched, compact)
    reads = module.read_stats()["t"]
    result = Result(
        open_seconds=seconds[0],
        slots=module.slots["t"],
        fast_bytes=module.fast_bytes,
        step_seconds=seconds[1],
        hit_rate=reads.hit_rate,
        touched=touched.numel(),
        disk_bytes=disk,
        snapshot_seconds=saved,
        most_memory=most,
    )
    module.close()
    return result


def _compare(run: Run, module: Any, touched: Tensor, compact: Tensor) -> None:
    """Raise `RuntimeError` unless the rows are what FBGEMM makes of a table of just these rows."""
    stock = SplitTableBatchedEmbeddingBagsCodegen(
        [(touched.numel(), run.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)], **_ROWWISE_ADAGRAD
    )
    bound = run.rows**-0.5
    rule = InitRule(seed=_SEED, low=-bound, high=bound)
    weights = stock.split_embedding_weights()[0].data
    for part in torch.arange(touched.numel()).split(100_000):
        weights[part] = initial_weights(rule, "t", touched[part], cols=run.dim)
    offsets = torch.arange(0, run.batch * run.length + 1, run.length)
    for ids in compact.split(run.batch * run.length):
        stock(ids, offsets).sum().backward()
    (state,) = stock.split_optimizer_states()[0]
    (ours,) = module._local()
    for part in torch.arange(touched.numel()).split(100_000):
        wanted = torch.cat([weights[part].view(torch.uint8), state[part].unsqueeze(1).view(torch.uint8)], dim=1)
        if not torch.equal(ours.read(touched[part]), wanted):
            raise RuntimeError("a trained row differs from FBGEMM's")


def main() -> int:
    """Train as the arguments say and print what it came to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.big_table", description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--cache-gib", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--directory", type=Path, help="on the disk to use (a temporary one)")
    given = parser.parse_args()
    run = Run(rows=given.rows, dim=given.dim, cache_bytes=int(given.cache_gib * 2**30), steps=given.steps)
    with tempfile.TemporaryDirectory(dir=given.directory) as folder:
        result = train(run, Path(folder))
    print(f"{run.rows:,} rows x {run.dim} in {given.cache_gib:g} GiB")
    for line in result.lines(run):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["Result", "Run", "main", "train"]
