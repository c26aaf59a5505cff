"""Serving lookups on a GPU: every row in slots, a Zipf stream over a DRAM tier, and NVE's published workload."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, CacheAlgorithm
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from benchmarks.figures import Figure, Goal
from benchmarks.gpu_context import GpuContext, Narrow, caller
from benchmarks.gpu_store import Pattern
from benchmarks.gpu_streams import Shape, Stream, distinct_ids
from benchmarks.gpu_tables import (
    INT8,
    Kind,
    Served,
    UvmServing,
    clean_up,
    fill_serving,
    ours_serving,
    stock_serving,
    warm,
)
from benchmarks.gpu_timing import Turns, Work, back_to_back, each_alone, milliseconds, split_rounds, wait
from benchmarks.timing import Pair

ALL_HIT = Shape(tables=8, rows=1_000_000, bags=4096, length=20)
ZIPF = Shape(tables=8, rows=5_000_000, bags=4096, length=20)
NVE = Shape(tables=1, rows=1 << 24, bags=256, length=1024)
_QUICK = Shape(tables=2, rows=20_000, bags=64, length=10)
_QUICK_NVE = Shape(tables=1, rows=50_000, bags=32, length=64)
SHARES = (0.1, 0.05, 0.2)
_NVE_KIND = Kind(data_type=SparseType.FP32, output=SparseType.FP32)
_NVE_KEYS, _NVE_TORCHREC_KEYS = 432, 186
"""Million keys a second that NVE's documentation gives for itself and for TorchRec's UVM caching on a GB200."""


@dataclass(frozen=True, kw_only=True)
class AllHit:
    """Ours with every row that is asked for in slots, beside stock with whole tables."""

    served: Served
    stock: IntNBitTableBatchedEmbeddingBagsCodegen
    stream: Stream
    batches: list[Tensor]


def all_hit(gpu: GpuContext) -> AllHit:
    """Made once a run."""

    def make() -> AllHit:
        shape = gpu.pick(ALL_HIT, _QUICK)
        stream = Stream(shape, device=gpu.device, seed=gpu.seed)
        batches = stream.batches(gpu.pick(10, 4))
        served = ours_serving(INT8, shape.tables, shape.rows, slots=shape.rows, dram=None, device=gpu.device)
        stock = stock_serving(INT8, served.tables, gpu.device)
        fill_serving(stock, served.pattern, served.tables)
        warm(served.module, distinct_ids(batches, shape.tables), shape.rows)
        return AllHit(served=served, stock=stock, stream=stream, batches=batches)

    return gpu.keep("all-hit", make)


def run_all_hit(gpu: GpuContext) -> Iterator[Figure]:
    made = all_hit(gpu)
    offsets, stream = made.stream.offsets, made.stream
    for batch in made.batches[:3]:
        made.served.check(batch, offsets, made.stock)
    checked = stock_serving(INT8, made.served.tables, gpu.device, bounds=BoundsCheckMode.WARNING)
    fill_serving(checked, made.served.pattern, made.served.tables)
    narrow = Narrow(made.batches, offsets)
    sides = {
        "ours": caller(made.served.module, offsets),
        "stock": narrow.caller(made.stock),
        "checked": narrow.caller(checked),
    }
    back_to_back(sides, [made.batches] * 2, gpu.device)
    before = made.served.hits()
    running = back_to_back(sides, [made.batches] * gpu.pick(9, 3), gpu.device)
    alone = each_alone(sides, made.batches * gpu.pick(4, 1), gpu.device)
    hits, reads = (b - a for a, b in zip(before, made.served.hits(), strict=True))
    note = f"{hits / max(1, reads):.2%} of lookups hit; outputs equal stock's bit for bit"
    for case, turns in (("back to back", running), ("one call, device idle before and after", alone)):
        yield _time(f"{stream.shape}, INT8, {case}", turns, "stock", "stock, whole tables in HBM", note)
        informs = f"{case}, stock that checks bounds as well"
        yield _time(informs, turns, "checked", "stock with BoundsCheckMode.WARNING", "", goal=False)
    if gpu.cuda:
        yield _captured(gpu, made)


def _captured(gpu: GpuContext, made: AllHit) -> Figure:
    """A lookup of one batch that a CUDA graph has captured, replayed."""
    batch, offsets, stock = made.batches[0], made.stream.offsets, made.stock
    with made.served.module.hold(batch, offsets) as held:
        narrow, ends = batch.int(), offsets.int()
        looks = {"ours": held.lookup, "stock": lambda: stock(narrow, ends)}
        graphs, outs = {}, {}
        for name, look in looks.items():
            look()
            graphs[name] = torch.cuda.CUDAGraph()
            wait(gpu.device)
            with torch.cuda.graph(graphs[name]):
                outs[name] = look()
            graphs[name].replay()
        if not torch.equal(outs["ours"], outs["stock"]):
            raise RuntimeError("a captured lookup differs from stock's")
        sides: dict[str, Work] = {name: _replayed(graph) for name, graph in graphs.items()}
        turns = back_to_back(sides, [made.batches] * 9, gpu.device)
    case, note = "one batch held, its lookup captured in a CUDA graph, replayed", "without finding its slots"
    return _time(case, turns, "stock", "stock's lookup, captured", note, goal=False)


def _replayed(graph: torch.cuda.CUDAGraph) -> Work:
    def work(batches: Sequence[Tensor]) -> None:
        for _ in batches:
            graph.replay()

    return work


def _time(case: str, turns: Turns, theirs: str, peer: str, note: str, *, goal: bool = True) -> Figure:
    pair = turns.pair("ours", theirs, lambda ms: ms * 1e3)
    return Figure(
        row="all-hit",
        case=case,
        unit="us a batch",
        ours=pair.our_median,
        peer=peer,
        theirs=pair.their_median,
        goal=Goal(at_most=True, reach=1.5, aim=1.2) if goal else None,
        note=note,
        details=pair.details(),
    )


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches of a stream, each used once by each side: to warm up, to time, and to count hits."""

    warming: list[Tensor]
    timed: list[Tensor]
    counted: list[Tensor]

    @classmethod
    def of(cls, stream: Stream, warming: int, timed: int, counted: int) -> Batches:
        drawn = stream.batches(warming + timed + counted)
        return cls(warming=drawn[:warming], timed=drawn[warming : warming + timed], counted=drawn[warming + timed :])

    @property
    def all(self) -> list[Tensor]:
        return [*self.warming, *self.timed, *self.counted]


@dataclass(frozen=True, kw_only=True)
class Zipf:
    """A stream, stock with whole tables in HBM, and the rows that UVM caching reads."""

    kind: Kind
    stream: Stream
    batches: Batches
    narrow: Narrow
    distinct: list[Tensor]
    stock: IntNBitTableBatchedEmbeddingBagsCodegen
    uvm: UvmServing | None
    tiered: dict[float, Served]

    def ours(self, gpu: GpuContext, share: float) -> Served:
        """`share` of the rows in slots, room for all in DRAM; warm with all rows that the stream asks for."""
        if share not in self.tiered:
            self.tiered[share] = self.warm(gpu, share)
        return self.tiered[share]

    def warm(self, gpu: GpuContext, share: float) -> Served:
        """The same, made anew."""
        shape = self.stream.shape
        slots = max(1, int(shape.rows * share))
        dram = shape.rows if gpu.cuda else None
        made = ours_serving(self.kind, shape.tables, shape.rows, slots=slots, dram=dram, device=gpu.device)
        warm(made.module, self.distinct, slots)
        caller(made.module, self.stream.offsets)(self.batches.warming)
        return made


def zipf_over(gpu: GpuContext, shape: Shape, counts: tuple[int, int, int], kind: Kind = INT8) -> Zipf:
    """A stream over `shape` and what all shares of it have in common."""
    stream = Stream(shape, device=gpu.device, seed=gpu.seed)
    batches = Batches.of(stream, *counts)
    tables = kind.tables(shape.tables, shape.rows)
    pattern = Pattern(tables, 0)
    whole = stock_serving(kind, tables, gpu.device)
    fill_serving(whole, pattern, tables)
    uvm = None
    if gpu.cuda:
        uvm = UvmServing(kind, tables, CacheAlgorithm.LRU, budget=0, least=0, device=gpu.device)
        fill_serving(uvm.module, pattern, tables)
    return Zipf(
        kind=kind,
        stream=stream,
        batches=batches,
        narrow=Narrow(batches.all, stream.offsets),
        distinct=distinct_ids(batches.all, shape.tables),
        stock=whole,
        uvm=uvm,
        tiered={},
    )


def zipf(gpu: GpuContext) -> Zipf:
    """Made once a run."""
    return gpu.keep("zipf", lambda: zipf_over(gpu, gpu.pick(ZIPF, _QUICK), gpu.pick((50, 30, 6), (4, 4, 2))))


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One share of slots: times, hit rates and device bytes by side; and why a peer could not run."""

    turns: Turns
    hit_rates: dict[str, float]
    nbytes: dict[str, int]
    slots: int
    failed: dict[str, str]


def compare(gpu: GpuContext, made: Zipf, share: float, algorithms: Sequence[CacheAlgorithm]) -> Compared:
    """Ours with `share` of the rows in slots beside stock, and UVM caching in the same device memory."""
    offsets = made.stream.offsets
    served = made.ours(gpu, share)
    served.check(made.batches.warming[-1], offsets, made.stock)
    sides: dict[str, Work] = {"ours": caller(served.module, offsets), "stock": made.narrow.caller(made.stock)}
    sides["stock"](made.batches.warming)
    caches: dict[str, UvmServing] = {}
    failed: dict[str, str] = {}
    for algorithm in algorithms if gpu.cuda else ():
        name = algorithm.name
        try:
            caches[name] = _cache(gpu, made, algorithm, served)
            sides[name] = made.narrow.caller(caches[name].module)
            sides[name](made.batches.warming)
            wait(gpu.device)
        except Exception as error:
            # A peer that cannot run here leaves the others to compare with.
            caches.pop(name, None)
            sides.pop(name, None)
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    before = served.hits()
    turns = back_to_back(sides, split_rounds(made.batches.timed, gpu.pick(6, 2)), gpu.device)
    hits, reads = (b - a for a, b in zip(before, served.hits(), strict=True))
    rates = {"ours": hits / max(1, reads)} | {n: _hit_rate(made, cache) for n, cache in caches.items()}
    nbytes = {"ours": served.nbytes} | {name: cache.nbytes for name, cache in caches.items()}
    return Compared(turns=turns, hit_rates=rates, nbytes=nbytes, slots=served.slots, failed=failed)


def _cache(gpu: GpuContext, made: Zipf, algorithm: CacheAlgorithm, served: Served) -> UvmServing:
    # LFU counts every row of the tables, which may take more than all of ours: it then gets as many rows as we have.
    least = served.slots * made.stream.shape.tables if algorithm is CacheAlgorithm.LFU else 0
    return UvmServing(
        made.kind, served.tables, algorithm, budget=served.nbytes, least=least, device=gpu.device, shared=made.uvm
    )


def _hit_rate(made: Zipf, cache: UvmServing) -> float:
    """Of further batches, counted as ours are: one miss for each different row that had to be fetched."""
    missed = 0
    for batch in made.batches.counted:
        missed += cache.misses(made.narrow[batch], made.narrow.offsets)
        cache.module(made.narrow[batch], made.narrow.offsets)
    return 1 - missed / (len(made.batches.counted) * made.stream.shape.lookups)


def faster(row: str, case: str, made: Zipf, found: Compared, side: str, goal: Goal | None, said: str = "") -> Figure:
    """Lookups a second of ours beside those of a peer."""
    lookups = made.stream.shape.lookups
    pair: Pair = found.turns.pair("ours", side, lambda ms: lookups / ms / 1e3)
    peer = {"stock": "stock, whole tables in HBM"}.get(side, f"UVM caching, {side}")
    note = f"{found.turns.median('ours'):.3g} against {found.turns.median(side):.3g} ms a batch"
    for what, of in (("hit rate", {k: f"{v:.2%}" for k, v in found.hit_rates.items()}), ("HBM", _mib(found.nbytes))):
        note += f"; {what} {of['ours']}" + (f" against {of[side]}" if side in of else "")
    return Figure(
        row=row,
        case=case,
        unit="M lookups/s",
        ours=pair.our_median,
        peer=peer,
        theirs=pair.their_median,
        goal=goal,
        note="; ".join(filter(None, (note, said))),
        details=pair.details() | {"hit rates": found.hit_rates, "HBM bytes": found.nbytes, "slots": found.slots},
    )


def _prefetched(gpu: GpuContext, made: Zipf, share: float, case: str) -> Figure:
    """One call after its batch was prefetched, and one without; every batch is new to the module."""
    module, offsets = made.warm(gpu, share).module, made.stream.offsets
    found: dict[bool, list[float]] = {True: [], False: []}
    for number, batch in enumerate([*made.batches.timed, *made.batches.counted]):
        ahead = number % 2 == 0
        if ahead:
            module.prefetch(batch, offsets)
        found[ahead].append(milliseconds(functools.partial(module, batch, offsets), gpu.device))
    pair = Pair(tuple(found[True]), tuple(found[False]))
    return Figure(
        row="zipf",
        case=f"{case}, one call, its batch prefetched",
        unit="ms a batch",
        ours=pair.our_median,
        peer="ours, not prefetched",
        theirs=pair.their_median,
        note="device idle before and after the call",
        details=pair.details(),
    )


def unmeasured(row: str, case: str, found: Compared) -> Iterator[Figure]:
    """Peers that could not run."""
    for side, why in found.failed.items():
        yield Figure(row=row, case=f"{case}, UVM caching, {side}", error=why)


def _mib(nbytes: dict[str, int]) -> dict[str, str]:
    return {side: f"{count / (1 << 20):,.0f} MiB" for side, count in nbytes.items()}


def run_zipf(gpu: GpuContext) -> Iterator[Figure]:
    made = zipf(gpu)
    for share in gpu.pick(SHARES, SHARES[:1]):
        gpu.check_time()
        first = share == SHARES[0]
        found = compare(gpu, made, share, (CacheAlgorithm.LRU, CacheAlgorithm.LFU))
        goal = Goal(at_most=False, reach=1.5, aim=3) if first else None
        case = f"{made.stream.shape}, INT8, {100 * share:g} % of rows in slots"
        for side in found.turns.rounds:
            if side != "ours":
                yield faster("zipf", case, made, found, side, None if side == "stock" else goal)
        if first:
            yield _prefetched(gpu, made, share, case)
        yield from unmeasured("zipf", case, found)
        if not first:
            del made.tiered[share]
        clean_up(gpu.device)


def run_nve(gpu: GpuContext) -> Iterator[Figure]:
    shape = gpu.pick(NVE, _QUICK_NVE)
    made = zipf_over(gpu, shape, gpu.pick((8, 12, 3), (2, 4, 1)), _NVE_KIND)
    found = compare(gpu, made, 0.1, (CacheAlgorithm.LRU,))
    size = shape.rows * made.kind.dim * 4 / (1 << 30)
    said = (
        f"a table of {size:.3g} GiB; NVE publishes {_NVE_KEYS} M keys/s for itself and {_NVE_TORCHREC_KEYS} for "
        "TorchRec's UVM caching, on a GB200 with 537 M rows (256 GiB)"
    )
    case = f"{shape}, FP32 x {made.kind.dim}, 10 % of rows in slots"
    for side in found.turns.rounds:
        if side != "ours":
            goal = None if side == "stock" else Goal(at_most=False, reach=1.5, aim=3)
            yield faster("nve", case, made, found, side, goal, said)
    yield from unmeasured("nve", case, found)


__all__ = [
    "ALL_HIT",
    "ZIPF",
    "AllHit",
    "Compared",
    "Zipf",
    "all_hit",
    "compare",
    "faster",
    "run_all_hit",
    "run_nve",
    "run_zipf",
    "unmeasured",
    "zipf",
    "zipf_over",
]
