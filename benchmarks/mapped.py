"""A Zipf stream served from slots, against the same stream from a memory-mapped file, both with as little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.context import Context
from benchmarks.figures import Figure
from benchmarks.mapped_child import BATCHES, MAPPED, MODULE, SIDES, Job
from benchmarks.memory_group import memory_group
from benchmarks.served import int8_tables, row_windows, stock_module, write_tables
from benchmarks.streams import zipf_batches
from benchmarks.tools import drop_caches
from torchrec_turbossd import TurboSSDInferenceModule
from torchrec_turbossd.tables import TableSpec

_ROOT = Path(__file__).absolute().parents[1]
_TABLES, _DIM, _ALPHA, _BAGS, _LENGTH = 4, 128, 1.05, 256, 10
_READERS = (1, 4)
_NOT_SLOTS = 64 << 20
"""Bytes of memory that our side leaves to all but slots and slot map."""


def run(context: Context) -> Iterator[Figure]:
    """Lookups a second and p99, with one reader and with four."""
    rows = context.pick(3_000_000, 500_000)
    tables = int8_tables([rows] * _TABLES, [_DIM] * _TABLES)
    limit = sum(t.rows * t.row_bytes for t in tables) // context.pick(6, 2)
    # Whether it can be done at all, before anything is written.
    with memory_group():
        pass
    with context.scratch("mapped") as folder:
        _prepare(context, folder, tables)
        results = {side: _run_side(context, folder, tables, side, limit) for side in SIDES}
    ours, theirs = (results[side]["readers"] for side in SIDES)
    if results[SIDES[0]]["digest"] != results[SIDES[1]]["digest"]:
        raise RuntimeError("the two sides gave different answers to the same batch")
    for mine, other in zip(ours, theirs, strict=True):
        yield from _figures(tables, limit, mine, other)


def _counts(context: Context) -> tuple[int, int, int]:
    """Batches to warm, and for each number of readers to settle and to measure."""
    return context.pick((700, 100, 500), (100, 30, 100))


def _prepare(context: Context, folder: Path, tables: Sequence[TableSpec]) -> None:
    """Write the batches, the mapped file as FBGEMM lays tables out, and a module's folder with the same rows."""
    warm, settle, measured = _counts(context)
    count = warm + len(_READERS) * (settle + measured)
    batches = zipf_batches([t.rows for t in tables], _ALPHA, context.seed, count=count, bags=_BAGS, length=_LENGTH)
    np.save(folder / BATCHES, torch.stack(list(batches)).numpy())
    layout = stock_module(tables)
    size = layout.weights_host.numel()
    held = torch.from_file(str(folder / MAPPED), shared=True, size=size, dtype=torch.uint8)
    for place, table in enumerate(tables):
        start = int(layout.weights_physical_offsets[place])
        whole = held[start : start + table.rows * table.row_bytes].view(table.rows, table.row_bytes)
        for ids, window in row_windows(table, context.seed + place):
            whole[ids[0] : ids[-1] + 1] = window
    del held
    write_tables(folder / "snapshot", tables, context.seed)
    with TurboSSDInferenceModule.from_embedding_specs(
        list(tables), ssd_directory=folder, name=MODULE, cache_hit_rate=0.01, device="cpu"
    ) as module:
        module.load_snapshot(folder / "snapshot")
    drop_caches(folder)


def _run_side(context: Context, folder: Path, tables: Sequence[TableSpec], side: str, limit: int) -> dict[str, Any]:
    warm, settle, measured = _counts(context)
    # Pages are counted where they are read first.
    drop_caches(folder)
    with memory_group() as group:
        job = Job(
            side=side,
            folder=str(folder),
            rows=[t.rows for t in tables],
            dim=_DIM,
            bags=_BAGS,
            length=_LENGTH,
            budget_bytes=limit - _NOT_SLOTS,
            limit_bytes=limit,
            warm_batches=warm,
            settle_batches=settle,
            batches=measured,
            seconds=context.pick(6.0, 1.0),
            readers=list(_READERS),
            procs=str(group.procs),
            limit=str(group.limit),
        )
        return _run_child(job)


def _run_child(job: Job) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.mapped_child", job.dumps()]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it was killed for want of memory"])[-1]
        raise RuntimeError(f"the {job.side} side ended with status {done.returncode}: {last}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _figures(tables: Sequence[TableSpec], limit: int, mine: dict[str, Any], other: dict[str, Any]) -> Iterator[Figure]:
    total = sum(t.rows * t.row_bytes for t in tables)
    readers = mine["readers"]
    case = f"{total / 2**20:,.0f} MiB of rows in {limit / 2**20:,.0f} MiB of memory, Zipf {_ALPHA}, {readers} reader"
    case += "s" * (readers > 1)
    peer = "memory-mapped file under FBGEMM's module"
    note = f"{mine['hit rate']:.1%} hits in {mine['slots of rows']:.1%} slots"
    details = {"ours": mine, "theirs": other}
    yield Figure(
        row="mapped-file",
        case=f"{case}, throughput",
        unit="lookups/s",
        ours=mine["lookups/s"],
        peer=peer,
        theirs=other["lookups/s"],
        note=note,
        details=details,
    )
    yield Figure(
        row="mapped-file",
        case=f"{case}, latency of {_TABLES} x {_BAGS} bags x {_LENGTH}",
        unit="ms p99",
        ours=mine["ms"]["p99"],
        peer=peer,
        theirs=other["ms"]["p99"],
        note=f"p50 {mine['ms']['p50']:.2f}/{other['ms']['p50']:.2f} ms",
    )


__all__ = ["run"]
