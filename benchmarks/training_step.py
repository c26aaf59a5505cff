"""Training steps over tables on SSD, against FBGEMM's own module that holds whole tables in fast memory.

`python -m benchmarks.training_step` measures on CUDA where there is a GPU, and prints a table.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from benchmarks.context import Context
from benchmarks.figures import Figure, Goal, number
from benchmarks.streams import Zipf, bag_offsets
from benchmarks.timing import interleave, seconds_of
from torchrec_turbossd.rows import initial_weights
from torchrec_turbossd.sharding.rank_store import RankStores, StoreOptions
from torchrec_turbossd.sizing import AccessProfile, HitRateCurve
from torchrec_turbossd.tables import InitRule, TableShard, TableSpec
from torchrec_turbossd.tbe.training import TrainingOptions, TurboSSDTableBatchedEmbeddingBags, row_state

_ALPHA, _SEED, _OPTIMIZER = 1.05, 11, EmbOptimType.EXACT_ROWWISE_ADAGRAD
_ARGUMENTS: dict[str, Any] = {"optimizer": _OPTIMIZER, "learning_rate": 0.05, "eps": 1e-6}


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is trained: `tables` x `rows` x `dim`, `bags` a step of `length` lookups each in every table."""

    tables: int
    rows: int
    dim: int
    bags: int
    length: int
    steps: int
    rounds: int


CPU = Size(tables=4, rows=200_000, dim=64, bags=512, length=10, steps=10, rounds=7)
CUDA = Size(tables=8, rows=1_000_000, dim=64, bags=4096, length=10, steps=10, rounds=5)
_QUICK = Size(tables=2, rows=5_000, dim=16, bags=32, length=4, steps=2, rounds=2)


class _Stream:
    """Batches of Zipf ids, the same for both sides."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self._size, self._device = size, device
        self._tables = [Zipf(size.rows, _ALPHA, _SEED + t) for t in range(size.tables)]
        self.offsets = bag_offsets(size.tables, size.bags, size.length).to(device)

    def batches(self, count: int) -> list[Tensor]:
        each = self._size.bags * self._size.length
        drawn = [[torch.from_numpy(t.draw(each)) for t in self._tables] for _ in range(count)]
        return [torch.cat(parts).to(self._device) for parts in drawn]


class _Ours:
    """Our module over a store in `folder`, which prefetches a batch between forward and backward of the one before."""

    def __init__(self, size: Size, slots: int, device: torch.device, folder: Path) -> None:
        bound = size.rows**-0.5
        init = InitRule(seed=_SEED, low=-bound, high=bound)
        self.shards = [
            TableShard.whole(
                TableSpec(name=f"t{t}", rows=size.rows, dim=size.dim, state=row_state(_OPTIMIZER), init=init)
            )
            for t in range(size.tables)
        ]
        self._stores = RankStores(StoreOptions(ssd_directory=folder), "bench", (0, 0), [(s, None) for s in self.shards])
        self.module = TurboSSDTableBatchedEmbeddingBags(
            self.shards,
            [slots] * size.tables,
            list(range(size.tables)),
            self._stores.store,
            device=device,
            options=TrainingOptions(tbe_args=dict(_ARGUMENTS)),
        )
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def train(self, batches: Sequence[Tensor], offsets: Tensor, gradient: Tensor, *, prefetch: bool) -> Tensor:
        out = gradient
        for number_of, ids in enumerate(batches):
            out = self.module(ids, offsets)
            if prefetch and number_of + 1 < len(batches):
                self._prefetch(batches[number_of + 1], offsets)
            out.backward(gradient)
        _wait(gradient.device)
        return out

    def _prefetch(self, ids: Tensor, offsets: Tensor) -> None:
        if self._side is None:
            self.module.prefetch(ids, offsets)
            return
        with torch.cuda.stream(self._side):
            self.module.prefetch(ids, offsets)

    def hit_rate(self) -> tuple[int, int]:
        """(hits, reads) so far."""
        reads = self.module.rows.counters.read().values()
        return sum(r.read_hit_count for r in reads), sum(r.read_total_count for r in reads)

    def close(self) -> None:
        self.module.close()
        self._stores.close()


class _Theirs:
    """FBGEMM's module with the same rows."""

    def __init__(self, size: Size, shards: Sequence[TableShard], device: torch.device) -> None:
        cuda = device.type == "cuda"
        where = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
        self.module = SplitTableBatchedEmbeddingBagsCodegen(
            [(size.rows, size.dim, *where)] * size.tables, device=device, **_ARGUMENTS
        )
        for shard, weights in zip(shards, self.module.split_embedding_weights(), strict=True):
            for ids in torch.arange(size.rows).split(100_000):
                values = initial_weights(shard.table.init, shard.table.name, ids.to(device), cols=size.dim)
                weights.data[ids[0] : int(ids[-1]) + 1] = values

    def train(self, batches: Sequence[Tensor], offsets: Tensor, gradient: Tensor) -> Tensor:
        out = gradient
        for ids in batches:
            out = self.module(ids, offsets)
            out.backward(gradient)
        _wait(gradient.device)
        return out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(size: Size, device: torch.device, folder: Path) -> Iterator[Figure]:
    """All rows in slots, then 90 % of lookups, without and with prefetch."""
    curve = HitRateCurve(AccessProfile.zipf(size.rows, _ALPHA))
    yield _compare("every row in slots", size, size.rows, device, folder / "whole", prefetch=False)
    for prefetch in (False, True):
        case = f"slots for 90 % of lookups, {'with' if prefetch else 'without'} prefetch"
        slots = min(size.rows, curve.slots_for(0.9))
        yield _compare(case, size, slots, device, folder / f"part-{prefetch}", prefetch=prefetch)


def _compare(case: str, size: Size, slots: int, device: torch.device, folder: Path, *, prefetch: bool) -> Figure:
    stream = _Stream(size, device)
    ours = _Ours(size, slots, device, folder)
    try:
        theirs = _Theirs(size, ours.shards, device)
        gradient = torch.full((size.bags, size.tables * size.dim), 1e-3, device=device)
        _fill(ours, theirs, stream, gradient, size, slots)
        rounds = iter([batches for batches in (stream.batches(size.steps) for _ in range(size.rounds)) for _ in "ab"])
        before = ours.hit_rate()
        pair = interleave(
            lambda: seconds_of(lambda _: ours.train(next(rounds), stream.offsets, gradient, prefetch=prefetch), 1),
            lambda: seconds_of(lambda _: theirs.train(next(rounds), stream.offsets, gradient), 1),
            size.rounds,
        )
        hits, reads = (b - a for a, b in zip(before, ours.hit_rate(), strict=True))
    finally:
        ours.close()
    return Figure(
        row="training-step",
        case=f"{size.tables} x {size.rows:,} x {size.dim} FP32, {size.bags} bags x {size.length}, {case}",
        unit="ms a step",
        ours=pair.our_median / size.steps * 1e3,
        peer="SplitTableBatchedEmbeddingBags, whole tables",
        theirs=pair.their_median / size.steps * 1e3,
        goal=Goal(at_most=True, reach=2, aim=1.3) if prefetch else None,
        note=f"{hits / reads:.1%} of lookups hit, {slots:,} slots a table, {device.type}",
        details=pair.details() | {"hit rate": hits / reads, "slots": slots},
    )


def _fill(ours: _Ours, theirs: _Theirs, stream: _Stream, gradient: Tensor, size: Size, slots: int) -> None:
    """Warm the slots, and see that both sides agree."""
    every = torch.arange(size.rows).split(4 * size.bags) if slots == size.rows else ()
    for ids in every:
        whole = ids.repeat(size.tables).to(gradient.device)
        offsets = torch.arange(0, whole.numel() + 1, device=gradient.device)
        with torch.no_grad():
            ours.module(whole, offsets)
    for batches in [stream.batches(size.steps) for _ in range(1 if slots == size.rows else 8)]:
        mine = ours.train(batches, stream.offsets, gradient, prefetch=False)
        other = theirs.train(batches, stream.offsets, gradient)
        if not torch.allclose(mine, other, rtol=1e-4, atol=1e-6):
            raise RuntimeError(f"a step differs from FBGEMM's by up to {float((mine - other).abs().max())}")


def run(context: Context) -> Iterator[Figure]:
    """The rows of a CPU."""
    with context.scratch("training") as folder:
        yield from measure(context.pick(CPU, _QUICK), torch.device("cpu"), folder)


def main() -> None:
    """Measure on the fastest device here and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--directory", type=Path, help="on the disk to measure (a temporary one)")
    given = parser.parse_args()
    device = torch.device(given.device)
    with tempfile.TemporaryDirectory(dir=given.directory) as folder:
        for figure in measure(CUDA if device.type == "cuda" else CPU, device, Path(folder)):
            ratio = f"{figure.ratio:.2f}" if figure.ratio is not None else "-"
            said = f"{number(figure.ours)} ms, {number(figure.theirs)} ms {figure.peer}, ratio {ratio}"
            print(f"{figure.case}: {said}; {figure.note}", flush=True)


if __name__ == "__main__":
    main()


__all__ = ["CPU", "CUDA", "Size", "main", "measure", "run"]
