"""Traffic whose hit rates are predicted: Zipf, drift, traces, a DLRM's reuse, and the demo's own tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from fbgemm_gpu.split_embedding_configs import SparseType

from benchmarks.context import Context
from benchmarks.figures import SkipRow
from benchmarks.measured import Traffic
from benchmarks.streams import Ints, Zipf, drifting, read_trace
from examples.dlrm_popularity import reuse_counts
from examples.source_tokens import FEATURES, TABLES, SampleStream, read_standard_library
from torchrec_turbossd.tables import TableSpec

SHARES = (0.01, 0.05, 0.10, 0.25)
"""Slots that are tried, as parts of a table's rows."""

ALPHAS = (0.8, 0.95, 1.05, 1.2)
_BATCH, _DIM = 256, 8
_DLRM_LOOKUPS = 1_036_236
_DEMO = {"tokens": (500_000, 28), "pairs": (1_000_000, 256), "triples": (1_000_000, 256)}
"""Lookups of a table of the demo, and samples of a batch. Its fourth table, of 256 rows, stays in memory."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One stream and the caches it is tried with.

    Attributes:
        name: of the stream.
        traffic: its table and lookups.
        slots: of each cache.
        alpha: where popularity is known to be Zipf and to stay.
        together: one of those of equal size that are also served by one module.
    """

    name: str
    traffic: Traffic
    slots: tuple[int, ...]
    alpha: float | None = None
    together: bool = False


def cases(context: Context) -> Iterator[Case | SkipRow]:
    """Every stream; a trace that cannot be read is the reason instead."""
    yield from zipf_cases(context)
    yield limit_case(context)
    for path in context.traces:
        try:
            yield _case(context, path.name, read_trace(path))
        except SkipRow as reason:
            yield reason
    yield _case(context, "DLRM reuse, shuffled", dlrm_ids(context.pick(_DLRM_LOOKUPS, 12_000), context.seed))
    yield from demo_cases(context)


def zipf_cases(context: Context) -> Iterator[Case]:
    """Zipf streams, and the one that drifts, all of one size."""
    rows, count = context.pick((100_000, 400_000), (6_000, 12_000))
    for alpha in context.pick(ALPHAS, (1.05,)):
        ids = Zipf(rows, alpha, context.seed).draw(count)
        yield replace(_case(context, f"Zipf {alpha}", ids, rows=rows), alpha=alpha, together=True)
    ids = drifting(rows, 1.05, context.seed, count)
    yield replace(_case(context, "Zipf 1.05 that drifts", ids, rows=rows), together=True)


def limit_case(context: Context) -> Case:
    """Batches of half the slots."""
    rows, count = context.pick((100_000, 400_000), (6_000, 12_000))
    slots = rows // 100
    ids = Zipf(rows, 1.05, context.seed).draw(count)
    traffic = Traffic(table=_table("half", rows), ids=ids, batch=slots // 2)
    return Case(name="Zipf 1.05, batches of half the slots", traffic=traffic, slots=(slots,), alpha=1.05)


def dlrm_ids(lookups: int, seed: int) -> Ints:
    """[lookups] ids of one table, asked for as often as those of a real DLRM's day, in random order."""
    random = np.random.default_rng(seed)
    counts = reuse_counts(lookups, 0, random)
    shuffled: Ints = random.permutation(np.repeat(random.permutation(counts.size), counts))
    return shuffled


def demo_cases(context: Context) -> Iterator[Case]:
    """The tables that the demo keeps on SSD, asked for as its batches of samples do, with smaller batches."""
    stream = SampleStream(read_standard_library(), seed=0)
    tables = context.pick(list(_DEMO), ["tokens"])
    for table in tables:
        lookups, samples = _DEMO[table]
        features = [feature for feature in FEATURES if feature.table == table]
        batch = samples * sum(feature.window for feature in features)
        drawn = []
        for number in range(context.pick(lookups, 16_000) // batch):
            places = stream.places(number, samples)
            drawn += [stream.rows(feature, places).reshape(-1) for feature in features]
        yield _case(context, f"demo's {table}", np.concatenate(drawn), rows=TABLES[table][0], batch=batch)


def _case(context: Context, name: str, ids: Ints, *, rows: int | None = None, batch: int = _BATCH) -> Case:
    """With batches of at most a third of the fewest slots, so that they do not crowd each other out."""
    rows = int(ids.max()) + 1 if rows is None else rows
    slots = tuple(max(1, round(rows * share)) for share in context.pick(SHARES, SHARES[1::2]))
    while batch > max(4, slots[0] // 3):
        batch //= 2
    return Case(name=name, traffic=Traffic(table=_table("t", rows), ids=ids, batch=batch), slots=slots)


def _table(name: str, rows: int) -> TableSpec:
    return TableSpec(name=name, rows=rows, dim=_DIM, data_type=SparseType.INT8)


__all__ = ["ALPHAS", "SHARES", "Case", "cases", "demo_cases", "dlrm_ids", "limit_case", "zipf_cases"]
