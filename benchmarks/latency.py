"""How long lookups take while rows are updated and while snapshots are swapped, against the same readers left quiet."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.context import Context
from benchmarks.figures import Figure, Goal
from benchmarks.readers import Latencies, read_during
from benchmarks.served import int8_tables, reads_of, torch_threads, write_tables
from benchmarks.streams import Zipf, bag_offsets, zipf_batches
from benchmarks.timing import percentiles
from torchrec_turbossd import AccessProfile, TurboSSDInferenceModule
from torchrec_turbossd.tables import TableSpec

P99_GOAL = Goal(at_most=True, reach=2.0, aim=1.2)
HITS_GOAL = Goal(at_most=False, reach=0.9, aim=0.98)
_ALPHA, _BAGS, _LENGTH = 1.05, 256, 10
_DIMS = (64, 128, 64, 96, 128, 64, 96, 128)
_CALL_ROWS, _ROWS_PER_S = 256, 10_000
_COMPARED = 100


@dataclass
class Scene:
    """A module that serves warm tables from two snapshots in turn, and what it is asked for."""

    module: TurboSSDInferenceModule
    tables: list[TableSpec]
    offsets: Tensor
    batches: list[Tensor]
    snapshots: list[Path]
    seed: int
    swap_s: list[float] = field(default_factory=list)
    updated: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Slots over rows."""
        return sum(self.module.slots.values()) / sum(t.rows for t in self.tables)

    def swap(self) -> None:
        start = time.perf_counter()
        self.module.load_snapshot(self.snapshots[len(self.swap_s) % 2])
        self.swap_s.append(time.perf_counter() - start)

    def update(self, seconds: float) -> None:
        """Update rows at a steady rate, the popular ones more often; notes the rows a second that were reached."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = [torch.from_numpy(Zipf(t.rows, _ALPHA, self.seed + i).draw(65536)) for i, t in enumerate(self.tables)]
        rows = [torch.randn(_CALL_ROWS, t.dim, generator=generator) for t in self.tables]
        start = time.perf_counter()
        for call in itertools.count():
            due = start + call * _CALL_ROWS / _ROWS_PER_S
            if due > start + seconds:
                break
            time.sleep(max(0.0, due - time.perf_counter()))
            place, first = call % len(self.tables), call * _CALL_ROWS % 65536
            part = ids[place][first : first + _CALL_ROWS]
            self.module.streaming_update(part, rows[place], table=self.tables[place].name)
        self.updated.append(call * _CALL_ROWS / (time.perf_counter() - start))


@contextmanager
def scene(context: Context, name: str) -> Iterator[Scene]:
    """Eight INT8 tables under Zipf 1.05, with slots for 85 % of lookups, warm."""
    rows = context.pick(200_000, 50_000)
    tables = int8_tables([rows] * len(_DIMS), _DIMS)
    access = {t.name: AccessProfile.zipf(t.rows, _ALPHA) for t in tables}
    count = context.pick(500, 150)
    batches = zipf_batches([t.rows for t in tables], _ALPHA, context.seed, count=count, bags=_BAGS, length=_LENGTH)
    with context.scratch(name) as folder:
        snapshots = [folder / "snapshot-0", folder / "snapshot-1"]
        for place, path in enumerate(snapshots):
            write_tables(path, tables, context.seed + place)
        with TurboSSDInferenceModule.from_embedding_specs(
            tables, ssd_directory=folder, cache_hit_rate=0.85, access=access, device="cpu"
        ) as module:
            made = Scene(
                module, tables, bag_offsets(len(tables), _BAGS, _LENGTH), list(batches), snapshots, context.seed
            )
            made.swap()
            for ids in made.batches[: count // 2]:
                module(ids, made.offsets)
            yield made


def run(context: Context) -> Iterator[Figure]:
    """Percentiles with one reader and with four; the readers are the threads, so operators have one each."""
    with scene(context, "latency") as made, torch_threads(1):
        for readers in (1, 4):
            yield from _with_readers(context, made, readers)


def _with_readers(context: Context, made: Scene, readers: int) -> Iterator[Figure]:
    seconds, rounds, swaps = context.pick(4.0, 0.6), context.pick(3, 1), context.pick(2, 1)

    def swap() -> None:
        for _ in range(swaps):
            made.swap()

    phases: dict[str, Callable[[], object]] = {
        "quiet": lambda: time.sleep(seconds),
        "updates": lambda: made.update(seconds),
        "swaps": swap,
    }
    taken = dict.fromkeys(phases, Latencies())
    done = len(made.swap_s)
    made.updated.clear()
    # In turns, so that a slow minute of the machine is in all of them.
    for _ in range(rounds):
        for phase, work in phases.items():
            taken[phase] += read_during(made.module, made.batches, made.offsets, readers, work)
    quiet = percentiles(taken["quiet"].seconds)
    notes = {
        "updates": f"{sum(made.updated) / len(made.updated):,.0f} rows/s updated",
        "swaps": f"{len(made.swap_s) - done} swaps of {sum(made.swap_s[done:]) / (len(made.swap_s) - done):.2f} s",
    }
    for phase, note in notes.items():
        yield _figure(made, readers, phase, taken[phase], quiet, note)


def _figure(made: Scene, readers: int, phase: str, taken: Latencies, quiet: dict[str, float], note: str) -> Figure:
    held = percentiles(taken.seconds)
    lookups, missed = reads_of(made.module)
    details: dict[str, Any] = {
        "ms": held,
        "quiet ms": quiet,
        "batches a second": held["count"] / taken.wall_s,
        "slots of rows": made.share,
        "hit rate so far": 1 - missed / lookups,
        "first failures": taken.failures[:3],
    }
    tail = ", ".join(f"{name} {held[name]:.2f}/{quiet[name]:.2f}" for name in ("p50", "p999", "max"))
    return Figure(
        row="latency",
        case=f"{len(made.tables)} x {made.tables[0].rows:,} x 64..128 INT8, Zipf {_ALPHA}, {made.share:.0%} slots, "
        f"{_BAGS} bags x {_LENGTH}, {readers} reader{'s' * (readers > 1)}, {phase}",
        unit="ms p99",
        ours=held["p99"],
        peer="the same readers, quiet",
        theirs=quiet["p99"],
        goal=P99_GOAL,
        failures=len(taken.failures),
        note=f"{note}; {len(taken.failures)} failed; ms here/quiet: {tail}",
        details=details,
    )


def run_swap_hits(context: Context) -> Iterator[Figure]:
    """Hit rate of the batches just after a swap, against those just before."""
    with scene(context, "hits") as made, torch_threads(1):
        # Fresh batches: those of the scene come round again, which would flatter both sides.
        seeds = itertools.count(context.seed + 1000)
        before, after = [], []
        for _ in range(context.pick(3, 1)):
            before.append(_hit_rate(made, next(seeds)))
            read_during(made.module, _fresh(made, next(seeds)), made.offsets, 1, made.swap)
            after.append(_hit_rate(made, next(seeds)))
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    yield Figure(
        row="swap-hits",
        case=f"the {_COMPARED} batches after a swap, Zipf {_ALPHA}, {made.share:.0%} slots, mean of {len(after)} swaps",
        unit="hit rate",
        ours=sum(after) / len(after),
        peer=f"the {_COMPARED} before",
        theirs=sum(before) / len(before),
        goal=HITS_GOAL,
        note=f"least ratio of one swap {min(ratios):.3f}",
        details={"before": before, "after": after},
    )


def _fresh(made: Scene, seed: int) -> Sequence[Tensor]:
    """Batches of the scene's popular rows, newly drawn."""
    rows = [t.rows for t in made.tables]
    return list(zipf_batches(rows, _ALPHA, made.seed, count=_COMPARED, bags=_BAGS, length=_LENGTH, draw_seed=seed))


def _hit_rate(made: Scene, seed: int) -> float:
    batches = _fresh(made, seed)
    lookups, missed = reads_of(made.module)
    for ids in batches:
        made.module(ids, made.offsets)
    after = reads_of(made.module)
    return 1 - (after[1] - missed) / (after[0] - lookups)


__all__ = ["run", "run_swap_hits"]
