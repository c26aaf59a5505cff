"""Three small tables, where every split of a budget can be tried: on the curves, while serving, and by the planner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

from benchmarks.context import Context
from benchmarks.measured import Traffic, second_halves
from benchmarks.page import Page, Section
from benchmarks.splits import Floats, every_choice, expected_misses, fewest_misses, items_of, spent
from benchmarks.streams import Zipf
from torchrec_turbossd.planner import TURBO_SSD, describe_plan, turbo_ssd_planner
from torchrec_turbossd.sharding import get_turbo_ssd_sharders
from torchrec_turbossd.sizing import (
    SLOT_MAP_BYTES_PER_ROW,
    AccessProfile,
    BudgetItem,
    HitRateCurve,
    slot_bytes,
    split_budget,
)
from torchrec_turbossd.tables import TableSpec

MOST = 1.01
"""What our misses may be of the best split's."""

SHARES = (0.1, 0.2, 0.4)
BUDGETS = (30_000, 50_000, 90_000)
"""Shares of the bytes of all rows, and bytes of the planner's rank."""

_SIZES = 24
_BATCH_SIZE = 8


@dataclass(frozen=True)
class Small:
    """rows, dim: of a table. alpha: its Zipf exponent. batch: lookups."""

    rows: int
    dim: int
    alpha: float
    batch: int


TABLES = {
    "mild": Small(rows=600, dim=8, alpha=0.7, batch=8),
    "usual": Small(rows=400, dim=32, alpha=1.05, batch=16),
    "steep": Small(rows=200, dim=64, alpha=1.3, batch=8),
}


def small_section(page: Page, context: Context) -> Section:
    """`split_budget` against the best split, expected and measured, and the planner against it."""
    traffic = _traffic(context)
    items = items_of(traffic, whole=True)
    whole = spent(items, [each.table.rows for each in traffic])
    budgets = [int(share * whole) for share in SHARES]
    ours = [list(split_budget(items, budget).values()) for budget in budgets]
    lines: list[list[str]] = []
    data: list[dict[str, object]] = []
    for share, budget, slots in zip(SHARES, budgets, ours, strict=True):
        best, _ = fewest_misses([every_choice(item) for item in items.values()], budget)
        _note(page, lines, data, f"curves, {share:.0%}", slots, (expected_misses(items, slots), best))
    for share, slots, (mine, best) in zip(SHARES, ours, _served(context, traffic, items, (budgets, ours)), strict=True):
        _note(page, lines, data, f"served, {share:.0%}", slots, (mine, best))
    for fast_bytes in BUDGETS:
        slots, mine, best = planned(fast_bytes)
        _note(page, lines, data, f"planner, {fast_bytes:,} bytes", slots, (mine, best))
    page.data["every split"] = data
    return Section(
        title="Against every split",
        columns=["what, budget", *TABLES, "ours", "best", "ratio", f"≤ {MOST:g}"],
        rows=lines,
        before="; ".join(
            f"{name}: {t.rows} rows x {t.dim}, Zipf {t.alpha}, {t.batch} lookups a batch" for name, t in TABLES.items()
        )
        + ". The columns are slots of each, and misses of a batch.",
        after='"curves": misses that the curves expect, against the best of all splits. "served": misses counted in '
        f"the second half; {_SIZES} sizes of each table were served, besides those of ours, and are joined by straight "
        'lines; the best of so many splits is partly luck. "planner": `turbo_ssd_planner` on one rank with FP32 '
        "rows, all tables on SSD; expected misses against the best split of the bytes that its plan took, which "
        "leaves each table the slots of two batches as well.",
    )


def _note(
    page: Page,
    lines: list[list[str]],
    data: list[dict[str, object]],
    what: str,
    slots: Sequence[int],
    misses: tuple[float, float],
) -> None:
    mine, best = misses
    ratio = mine / best if best else 1.0
    if ratio > MOST:
        page.missed.append(f"{what}: {ratio:.3f} times the best split's misses, {MOST:g} allowed")
    figures = [f"{mine:.3f}", f"{best:.3f}", f"{ratio:.4f}", "held" if ratio <= MOST else "missed"]
    lines.append([what, *(f"{n:,}" for n in slots), *figures])
    data.append({"what": what, "slots": list(slots), "ours": mine, "best": best, "ratio": ratio})


def _traffic(context: Context) -> list[Traffic]:
    batches = context.pick(3_000, 300)
    return [
        Traffic(
            table=TableSpec(name=name, rows=small.rows, dim=small.dim, data_type=SparseType.INT8),
            ids=Zipf(small.rows, small.alpha, context.seed).draw(batches * small.batch),
            batch=small.batch,
        )
        for name, small in TABLES.items()
    ]


def _served(
    context: Context,
    traffic: Sequence[Traffic],
    items: Mapping[str, BudgetItem],
    splits: tuple[Sequence[int], Sequence[Sequence[int]]],
) -> list[tuple[float, float]]:
    """For each budget, misses of a batch of our split and of the best of all splits, by what was counted."""
    budgets, ours = splits
    sizes = [
        np.union1d(
            np.geomspace(item.floor_slots, item.max_slots, context.pick(_SIZES, 6)).round().astype(np.int64),
            [slots[place] for slots in ours],
        )
        for place, item in enumerate(items.values())
    ]
    with context.scratch("small") as folder:
        reads = second_halves(traffic, [each.tolist() for each in sizes], folder)
    choices: list[tuple[Floats, Floats]] = []
    for each, item, size, counted in zip(traffic, items.values(), sizes, reads, strict=True):
        slots = np.arange(item.floor_slots, item.max_slots + 1)
        missed = np.interp(slots, size, [each.batch * (1 - read.hit_rate) for read in counted])
        choices.append(((slots * item.bytes_per_slot).astype(np.float64), missed))
    found = []
    for budget, mine in zip(budgets, ours, strict=True):
        places = [count - item.floor_slots for count, item in zip(mine, items.values(), strict=True)]
        misses = sum(float(missed[place]) for (_, missed), place in zip(choices, places, strict=True))
        found.append((misses, fewest_misses(choices, budget)[0]))
    return found


def planned(fast_bytes: int) -> tuple[list[int], float, float]:
    """Slots of the planner's plan for one rank, and misses of a batch expected with them and with the best split."""
    topology = Topology(world_size=1, local_world_size=1, compute_device="cpu", ddr_cap=fast_bytes, ssd_cap=10**9)
    profiles = {name: AccessProfile.zipf(small.rows, small.alpha) for name, small in TABLES.items()}
    planner = turbo_ssd_planner(
        topology,
        _BATCH_SIZE,
        {
            name: ParameterConstraints(
                compute_kernels=[TURBO_SSD],
                sharding_types=["table_wise"],
                pooling_factors=[small.batch / _BATCH_SIZE],
            )
            for name, small in TABLES.items()
        },
        access=profiles,
        storage_reservation=FixedPercentageStorageReservation(0.0),
    )
    model, sharders = _model(), get_turbo_ssd_sharders()
    rows = {row.table: row for row in describe_plan(planner.plan(model, sharders), model, sharders)}
    slots = [rows[name].slots or 0 for name in TABLES]
    items = {
        name: BudgetItem(
            bytes_per_slot=slot_bytes(4 * small.dim),
            curve=HitRateCurve(profiles[name]),
            weight=float(small.batch),
            # Of the two batches that are in flight.
            floor_slots=2 * small.batch,
            max_slots=small.rows,
            # The reserved slot and the slot map, as the plan counts them.
            fixed_bytes=slot_bytes(4 * small.dim) + SLOT_MAP_BYTES_PER_ROW * small.rows,
        )
        for name, small in TABLES.items()
    }
    taken = sum(rows[name].fast_bytes or 0 for name in TABLES)
    best, _ = fewest_misses([every_choice(item) for item in items.values()], taken)
    return slots, expected_misses(items, slots), best


def _model() -> nn.Module:
    model = nn.Module()
    model.ebc = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(name=n, num_embeddings=t.rows, embedding_dim=t.dim, feature_names=[f"f_{n}"])
            for n, t in TABLES.items()
        ],
    )
    return model


__all__ = ["BUDGETS", "MOST", "SHARES", "TABLES", "Small", "planned", "small_section"]
