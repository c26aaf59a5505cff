"""Training steps on a GPU, rows in slots and in DRAM, beside whole tables in HBM and UVM caching."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torch import Tensor

from benchmarks.figures import Figure, Goal
from benchmarks.gpu_context import GpuContext
from benchmarks.gpu_streams import ALPHA, Shape, Stream, distinct_ids
from benchmarks.gpu_tables import (
    Trained,
    TrainKind,
    clean_up,
    fill_training,
    hits_of,
    ours_training,
    stock_training,
    warm,
)
from benchmarks.gpu_timing import Turns, back_to_back, split_rounds
from torchrec_turbossd.sizing import AccessProfile, HitRateCurve

_SHAPE, _QUICK = (
    Shape(tables=8, rows=1_000_000, bags=4096, length=10),
    Shape(tables=2, rows=10_000, bags=64, length=5),
)
_WIDE = Shape(tables=8, rows=1_000_000, bags=4096, length=20)
_DYNAMIC = Shape(tables=10, rows=750_000, bags=104_857, length=1)
_QUICK_DYNAMIC = Shape(tables=2, rows=20_000, bags=512, length=1)
_HIT_RATE = 0.9
_PUBLISHED = {
    EmbOptimType.EXACT_SGD: "20.8 ms dynamicemb, 4.77 ms TorchRec's UVM caching",
    EmbOptimType.ADAM: "12.28 to 24.33 ms dynamicemb, 14.4 to 15.0 ms TorchRec's UVM caching, 1.35 ms all in HBM",
}
"""What the tables of recsys-examples' dynamicemb benchmark say of one H100, at 10 % of rows cached."""


def train_stock(module: Any, offsets: Tensor, gradient: Tensor) -> Callable[[Sequence[Tensor]], Tensor]:
    """Forward and backward of each batch; gives the last output."""

    def work(batches: Sequence[Tensor]) -> Tensor:
        out = gradient
        for ids in batches:
            out = module(ids, offsets)
            out.backward(gradient)
        return out

    return work


def train_ours(trained: Trained, offsets: Tensor, gradient: Tensor) -> Callable[[Sequence[Tensor]], Tensor]:
    """The same, the next batch fetched on a stream of its own between forward and backward."""
    module = trained.module
    side = torch.cuda.Stream(gradient.device) if gradient.device.type == "cuda" else None

    def prefetch(ids: Tensor) -> None:
        if side is None:
            module.prefetch(ids, offsets)
            return
        with torch.cuda.stream(side):
            module.prefetch(ids, offsets)

    def work(batches: Sequence[Tensor]) -> Tensor:
        out = gradient
        for number, ids in enumerate(batches):
            out = module(ids, offsets)
            if number + 1 < len(batches):
                prefetch(batches[number + 1])
            out.backward(gradient)
        return out

    return work


@dataclass(frozen=True, kw_only=True)
class Trainees:
    """Sides that train on the same batches.

    sides: by name. ours: those of them that are ours, by name.
    """

    kind: TrainKind
    stream: Stream
    gradient: Tensor
    warming: list[Tensor]
    timed: list[Tensor]
    sides: dict[str, Callable[[Sequence[Tensor]], Tensor]] = field(default_factory=dict)
    ours: dict[str, Trained] = field(default_factory=dict)

    def add_ours(self, gpu: GpuContext, name: str, slots: int) -> Trained:
        """Ours, warm with all rows that the batches ask for."""
        shape = self.stream.shape
        dram = shape.rows - slots if gpu.cuda and slots < shape.rows else None
        trained = ours_training(self.kind, shape.tables, shape.rows, slots=slots, dram=dram, device=gpu.device)
        warm(trained.module, distinct_ids([*self.warming, *self.timed], shape.tables), slots)
        for name_of in ("iter", "iter_cpu"):
            # FBGEMM counts every forward as a step, which Adam's correction goes by.
            steps = getattr(trained.module.tbe, name_of, None)
            if isinstance(steps, Tensor):
                steps.data.zero_()
        self.ours[name] = trained
        self.sides[name] = train_ours(trained, self.stream.offsets, self.gradient)
        return trained

    def add_stock(self, gpu: GpuContext, name: str, like: Trained, cached: int | None = None) -> None:
        """FBGEMM's module with the rows that `like` began with."""
        stock = stock_training(self.kind, like.tables, gpu.device, cached=cached)
        fill_training(stock, like.pattern, like.tables)
        self.sides[name] = train_stock(stock, self.stream.offsets, self.gradient)

    def warm_up(self, gpu: GpuContext) -> None:
        """All sides train on the same batches; raises where one of ours gives other outputs than stock."""
        for batches in split_rounds(self.warming, 2):
            outs = {name: side(batches) for name, side in self.sides.items()}
            for name in self.ours:
                if not torch.allclose(outs[name], outs["stock"], rtol=1e-3, atol=1e-4):
                    worst = float((outs[name] - outs["stock"]).abs().max())
                    raise RuntimeError(f"a training step ({name}) differs from stock's by up to {worst}")

    def time(self, gpu: GpuContext) -> tuple[Turns, dict[str, float]]:
        """Times of a step by side, and hit rates of ours."""
        before = {name: hits_of(each.module) for name, each in self.ours.items()}
        turns = back_to_back(self.sides, split_rounds(self.timed, gpu.pick(4, 1)), gpu.device)
        rates = {}
        for name, each in self.ours.items():
            hits, reads = (b - a for a, b in zip(before[name], hits_of(each.module), strict=True))
            rates[name] = hits / max(1, reads)
        return turns, rates


def trainees(gpu: GpuContext, kind: TrainKind, shape: Shape, counts: tuple[int, int]) -> Trainees:
    """A stream and nobody who trains on it yet."""
    stream = Stream(shape, device=gpu.device, seed=gpu.seed)
    drawn = stream.batches(sum(counts))
    gradient = torch.full((shape.bags, shape.tables * kind.dim), 1e-3, device=gpu.device)
    return Trainees(kind=kind, stream=stream, gradient=gradient, warming=drawn[: counts[0]], timed=drawn[counts[0] :])


def slots_for(rows: int, hit_rate: float) -> int:
    """Slots of a table for this share of Zipf lookups."""
    return min(rows, HitRateCurve(AccessProfile.zipf(rows, ALPHA)).slots_for(hit_rate))


def training(gpu: GpuContext) -> Trainees:
    """FP32, made once a run."""

    def make() -> Trainees:
        shape = gpu.pick(_SHAPE, _QUICK)
        return _with_peers(gpu, trainees(gpu, TrainKind(dim=64), shape, gpu.pick((8, 24), (4, 4))))

    return gpu.keep("training", make)


def _with_peers(gpu: GpuContext, made: Trainees) -> Trainees:
    rows, tables = made.stream.shape.rows, made.stream.shape.tables
    slots = slots_for(rows, _HIT_RATE)
    part = made.add_ours(gpu, "ours", slots)
    made.add_ours(gpu, "whole", rows)
    made.add_stock(gpu, "stock", part)
    if gpu.cuda:
        made.add_stock(gpu, "uvm", part, cached=slots * tables)
    made.warm_up(gpu)
    return made


def run_training(gpu: GpuContext) -> Iterator[Figure]:
    yield from _told(gpu, training(gpu))
    gpu.check_time()
    shape = gpu.pick(_WIDE, _QUICK)
    kind = TrainKind(dim=128, data_type=SparseType.FP16)
    yield from _told(gpu, _with_peers(gpu, trainees(gpu, kind, shape, gpu.pick((6, 16), (4, 4)))))
    clean_up(gpu.device)


def _told(gpu: GpuContext, made: Trainees) -> Iterator[Figure]:
    turns, rates = made.time(gpu)
    case = f"{made.stream.shape}, {made.kind.data_type.name} x {made.kind.dim}, row-wise Adagrad"
    part = f"{made.ours['ours'].slots:,} slots a table, the rest in DRAM, next batch prefetched"
    goal = Goal(at_most=True, reach=2, aim=1.3)
    yield _step("training", f"{case}, {part}", turns, ("ours", "stock"), rates, goal)
    if "uvm" in turns.rounds:
        yield _step("training", f"{case}, {part}", turns, ("ours", "uvm"), rates, None)
    yield _step("training", f"{case}, every row in slots", turns, ("whole", "stock"), rates, None)


def _step(
    row: str,
    case: str,
    turns: Turns,
    sides: tuple[str, str],
    rates: dict[str, float],
    goal: Goal | None,
    said: str = "",
) -> Figure:
    pair = turns.pair(*sides)
    peers = {"stock": "stock, whole tables in HBM", "uvm": "UVM caching, LRU, as many rows cached"}
    return Figure(
        row=row,
        case=case,
        unit="ms a step",
        ours=pair.our_median,
        peer=peers[sides[1]],
        theirs=pair.their_median,
        goal=goal,
        note="; ".join(filter(None, (f"{rates[sides[0]]:.2%} of lookups hit", said))),
        details=pair.details() | {"hit rate": rates[sides[0]]},
    )


def run_dynamicemb(gpu: GpuContext) -> Iterator[Figure]:
    shape = gpu.pick(_DYNAMIC, _QUICK_DYNAMIC)
    optimizers = [EmbOptimType.EXACT_SGD, EmbOptimType.ADAM]
    for optimizer in optimizers if gpu.cuda else optimizers[:1]:
        gpu.check_time()
        kind = TrainKind(dim=128, optimizer=optimizer, arguments={"learning_rate": 0.01})
        made = trainees(gpu, kind, shape, gpu.pick((4, 12), (2, 3)))
        slots = shape.rows // 10
        ours = made.add_ours(gpu, "ours", slots)
        made.add_stock(gpu, "stock", ours)
        if gpu.cuda:
            made.add_stock(gpu, "uvm", ours, cached=slots * shape.tables)
        made.warm_up(gpu)
        turns, rates = made.time(gpu)
        distinct = sum(each.numel() for each in distinct_ids(made.timed[:1], shape.tables))
        said = f"{distinct:,} different rows a step; published on an H100: {_PUBLISHED[optimizer]}"
        case = f"{shape}, FP32 x 128, {optimizer.name}, 10 % of rows in slots, the rest in DRAM, next batch prefetched"
        for side in turns.rounds:
            if side != "ours":
                yield _step("dynamicemb", case, turns, ("ours", side), rates, None, said)
        del made, ours
        clean_up(gpu.device)


__all__ = ["Trainees", "run_dynamicemb", "run_training", "slots_for", "train_ours", "train_stock", "training"]
