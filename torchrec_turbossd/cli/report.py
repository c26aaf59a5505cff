"""A plan with everything that is predicted of it, as plain values that are written and read as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_turbossd.sizing.json_file import check_keys, only_corrupt, read_json

FORMAT = "torchrec_turbossd plan"
FORMAT_VERSION = 1

_SHARES = {"hit_rate", "hit_rate_on_ssd", "dram_hit_rate", "dram_hit_rate_on_ssd", "slot_share", "reserve"}
_MAY_BE_BELOW_0 = {"fast_free_bytes"}


@dataclass(frozen=True, kw_only=True)
class Milliseconds:
    """Expected time of one training step.

    Attributes:
        compute: lookups, gradients and updates, with every row in memory.
        communication: ids, rows and gradients between ranks.
        ssd: reads of rows that are not in a slot: from SSD, and on a GPU from DRAM.
        total: of all, one after the other.
    """

    compute: float = 0.0
    communication: float = 0.0
    ssd: float = 0.0
    total: float = 0.0

    def __add__(self, other: Milliseconds) -> Milliseconds:
        return Milliseconds(
            compute=self.compute + other.compute,
            communication=self.communication + other.communication,
            ssd=self.ssd + other.ssd,
            total=self.total + other.total,
        )


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """A part of a table on one rank.

    Attributes:
        rank: that holds it.
        first_row, first_col, rows, cols: what of the table it is.
        row_bytes: weights and optimizer state of one of its rows.
        slots: rows of fast memory, where the others are on SSD; null where all are in memory.
        hit_rate: predicted share of lookups, repeated ones included, whose row is in fast memory.
        dram_slots: rows that the DRAM tier of a GPU keeps besides those in slots; 0 where it has none.
        dram_hit_rate: predicted share of lookups whose row is there.
        lookups: of one global batch that it answers.
        fast_bytes, dram_bytes, ssd_bytes: it takes of fast memory, of DRAM beside HBM, and of SSD once every row has
            been written.
        io_bytes: fast memory that it takes beside `fast_bytes`: batches in flight, input and output.
        ms: expected time of one step.
    """

    rank: int
    first_row: int
    first_col: int
    rows: int
    cols: int
    row_bytes: int
    slots: int | None
    hit_rate: float
    dram_slots: int
    dram_hit_rate: float
    lookups: float
    fast_bytes: int
    dram_bytes: int
    ssd_bytes: int
    io_bytes: int
    ms: Milliseconds


@dataclass(frozen=True, kw_only=True)
class TableReport:
    """One table.

    Attributes:
        name: its name.
        module: path of its module in the model.
        rows, dim, data_type, kind, features: what it is.
        access: where its access profile came from.
        tier: where its rows are: "SSD" (with slots in fast memory), "HBM" or "DRAM".
        forced: whether constraints left it no other tier.
        sharding_type, compute_kernel: TorchRec's names.
        ranks: that hold a part of it.
        slots: of all parts; null where all rows are in memory.
        slot_share: share of its rows, or parts of rows, that have a slot.
        hit_rate: predicted, per lookup.
        dram_slots, dram_hit_rate: of all parts: rows in the DRAM tier of a GPU, and lookups whose row is there.
        lookups: of one global batch.
        memory_bytes: fast memory that it would take, or takes, with all rows there: weights and optimizer state.
        lookups_per_mib: of a global batch, for each MiB of `memory_bytes`: tables with the fewest go to SSD first.
        fast_bytes, dram_bytes, ssd_bytes, io_bytes: as of the parts, added up.
        ms: of the rank where it takes longest.
        shards: its parts.
    """

    name: str
    module: str
    rows: int
    dim: int
    data_type: str
    kind: str
    features: list[str]
    access: str
    tier: str
    forced: bool
    sharding_type: str
    compute_kernel: str
    ranks: list[int]
    slots: int | None
    slot_share: float
    hit_rate: float
    dram_slots: int
    dram_hit_rate: float
    lookups: float
    memory_bytes: int
    lookups_per_mib: float
    fast_bytes: int
    dram_bytes: int
    ssd_bytes: int
    io_bytes: int
    ms: Milliseconds
    shards: list[ShardReport]


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """One rank.

    Attributes:
        rank: its number.
        fast_capacity_bytes: its fast memory.
        fast_reserved_bytes: of it, kept back for other things than tables.
        fast_used_bytes: taken by tables, slots, slot maps and batches in flight.
        fast_free_bytes: left over.
        dram_capacity_bytes, dram_used_bytes: DRAM beside HBM; 0 on a CPU topology.
        store_bytes: DRAM that its row stores take at most, which comes on top of all that the plan counts.
        dram_short_bytes: what is missing for that: beside the tables, and what is kept back for other things is theirs.
        ssd_capacity_bytes, ssd_used_bytes: SSD.
        tables: tables of which it has a part.
        lookups: of one global batch that it answers.
        hit_rate: predicted share of them whose row is in fast memory.
        ms: expected time of the parts of one step.
        step_ms: expected time of the step: where batches are prefetched, SSD and the rest go on side by side.
    """

    rank: int
    fast_capacity_bytes: int
    fast_reserved_bytes: int
    fast_used_bytes: int
    fast_free_bytes: int
    dram_capacity_bytes: int
    dram_used_bytes: int
    store_bytes: int
    dram_short_bytes: int
    ssd_capacity_bytes: int
    ssd_used_bytes: int
    tables: int
    lookups: float
    hit_rate: float
    ms: Milliseconds
    step_ms: float


@dataclass(frozen=True, kw_only=True)
class MachineReport:
    """What was planned for. Sizes are of one rank, speeds bytes or reads a second of one rank.

    Attributes:
        device: "cpu" or "cuda".
        ranks, ranks_per_host: how many there are.
        fast_memory: "HBM" or "DRAM": where slots are.
        reserve: share of fast memory kept back.
        hbm_bytes, dram_bytes, ssd_bytes: capacities; no HBM on a CPU topology.
        hbm_bandwidth, dram_bandwidth, host_to_device_bandwidth: of memory.
        intra_host_bandwidth, inter_host_bandwidth: between ranks.
        ssd_reads_per_second, ssd_bandwidth: of the SSD.
        ssd_writes_per_read: rows written for each one read.
        notes: how they were measured, where they were.
    """

    device: str
    ranks: int
    ranks_per_host: int
    fast_memory: str
    reserve: float
    hbm_bytes: int
    dram_bytes: int
    ssd_bytes: int
    hbm_bandwidth: float
    dram_bandwidth: float
    host_to_device_bandwidth: float
    intra_host_bandwidth: float
    inter_host_bandwidth: float
    ssd_reads_per_second: float
    ssd_bandwidth: float
    ssd_writes_per_read: float
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class OneMoreGib:
    """What one more GiB of fast memory on each rank would do, with the tables where they are.

    Attributes:
        hit_rate: of all lookups then.
        ssd_ms: of the rank with the most of them, then.
        ssd_ms_now: and now.
    """

    hit_rate: float
    ssd_ms: float
    ssd_ms_now: float


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """A plan.

    Attributes:
        machine: what was planned for.
        optimizer: FBGEMM's name.
        batch_size: of one rank.
        batches_in_flight: batches whose rows are in slots at once.
        lookups: of one global batch.
        hit_rate: predicted share of them, repeated ones included, whose row is in fast memory.
        hit_rate_on_ssd: the same of the tables on SSD alone; null where there is none.
        dram_hit_rate_on_ssd: predicted share of the lookups of these whose row is in the DRAM tier of a GPU; null
            where there is no such table.
        step_ms: expected time of the slowest rank.
        slowest_rank: which that is.
        ranks, tables: all of them.
        one_more_gib: null where no table on SSD could use it.
        warnings: why the plan would not do as it is, in sentences; empty where it will.
    """

    machine: MachineReport
    optimizer: str
    batch_size: int
    batches_in_flight: int
    lookups: float
    hit_rate: float
    hit_rate_on_ssd: float | None
    dram_hit_rate_on_ssd: float | None
    step_ms: float
    slowest_rank: int
    ranks: list[RankReport]
    tables: list[TableReport]
    one_more_gib: OneMoreGib | None
    warnings: list[str]

    def to_json(self) -> str:
        """The report as a JSON object with `format` and `version`."""
        whole = {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def load_report(path: Path) -> PlanReport:
    """Read what `PlanReport.to_json` made.

    Raises:
        FileNotFoundError: no such file.
        FormatVersionError: a newer release wrote it.
        CorruptError: anything else than a whole plan.
    """
    whole, _ = read_json(path, format=FORMAT, newest=FORMAT_VERSION)
    with only_corrupt(path, FORMAT):
        report: PlanReport = _restored(PlanReport, whole, "it")
        if report.slowest_rank not in {rank.rank for rank in report.ranks}:
            raise ValueError(f"there is no rank {report.slowest_rank}, which is said to be the slowest")
        return report


def _restored(kind: Any, value: Any, place: str) -> Any:
    """A value of a dataclass, a list of them, one or None, or a plain value, from JSON's."""
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        if not isinstance(value, list):
            raise ValueError(f"{place} is no list")
        return [_restored(inner, one, place) for one in value]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = next(one for one in typing.get_args(kind) if one is not types.NoneType)
        return None if value is None else _restored(inner, value, place)
    if not dataclasses.is_dataclass(kind):
        return _plain(kind, value, place)
    hints = typing.get_type_hints(kind)
    check_keys(value, set(hints), place)
    return kind(**{name: _restored(hints[name], one, name) for name, one in value.items()})  # type: ignore[operator]


def _plain(kind: Any, value: Any, place: str) -> Any:
    """A word, a truth, or a number that is finite and not negative; rates and shares are at most 1."""
    given = type(value)
    if given is not kind and not (kind is float and given is int):
        raise ValueError(f"{place} must be of type {kind.__name__}, got {value!r}")
    if given in (int, float):
        most = 1.0 if place in _SHARES else sys.float_info.max
        least = -sys.float_info.max if place in _MAY_BE_BELOW_0 else 0.0
        if not least <= value <= most:
            raise ValueError(f"{place} must be from {least:g} to {most:g}, got {value!r}")
    return float(value) if kind is float else value


__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MachineReport",
    "Milliseconds",
    "OneMoreGib",
    "PlanReport",
    "RankReport",
    "ShardReport",
    "TableReport",
    "load_report",
]
