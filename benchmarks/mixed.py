"""Several tables in one serving module whose memory is limited: the hit rate of all, predicted and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.context import Context
from benchmarks.measured import Traffic, expected_overall, overall, second_half_of_module
from benchmarks.page import Page, Section
from benchmarks.predictions import Predictions
from benchmarks.served import write_tables
from benchmarks.traffic import Case
from torchrec_turbossd import TurboSSDInferenceModule
from torchrec_turbossd.metrics import TableReads
from torchrec_turbossd.sizing import SLOT_MAP_BYTES_PER_ROW, AccessProfile, slot_bytes

_SHARES = (0.05, 0.10, 0.20)
_GIB = 1 << 30
_GOAL = 3.0


def mixed_section(page: Page, context: Context, known: Sequence[tuple[Case, Predictions]]) -> Section:
    """The cases that go together, with what was predicted for them, in one module that splits its budget."""
    traffic = [
        replace(case.traffic, table=replace(case.traffic.table, name=f"t{place}"))
        for place, (case, _) in enumerate(known)
    ]
    predicted = [one for _, one in known]
    access = {each.table.name: p.past.profile for each, p in zip(traffic, predicted, strict=True)}
    lines: list[list[str]] = []
    data: list[dict[str, object]] = []
    # Quick tables are small beside the least slots of a table.
    for share in context.pick(_SHARES, (0.4,)):
        with context.scratch("mixed") as folder:
            slots, reads = _serve(traffic, access, share, folder)
        rates = {
            name: expected_overall(
                [getattr(p, name).hit_rate(n) for p, n in zip(predicted, slots, strict=True)], traffic
            )
            for name in ("whole", "small", "past")
        }
        rule = sum(slots) / sum(each.table.rows for each in traffic)
        measured = overall(reads)
        off = {name: 100 * (rate - measured) for name, rate in {**rates, "rule": rule}.items()}
        lines.append(
            [
                f"{share:.0%}",
                ", ".join(f"{n:,}" for n in slots),
                f"{measured:.1%}",
                *(f"{p:+.1f}" for p in off.values()),
            ]
        )
        data.append({"share": share, "slots": slots, "measured": measured, **rates, "slots / rows": rule})
        worst = max(abs(off["whole"]), abs(off["small"]))
        if worst > _GOAL:
            page.missed.append(f"all tables at {share:.0%}: off by {worst:.1f} points, {_GOAL:g} allowed")
    page.data["several tables"] = data
    return Section(
        title="Several tables in one module",
        columns=["budget", "slots", "measured", "sample", "small sample", "first half", "slots / rows"],
        rows=lines,
        before=f"{'; '.join(case.name for case, _ in known)}: {traffic[0].table.rows:,} rows each in one "
        "`TurboSSDInferenceModule`, which was given profiles of the first half and a budget of the share of all rows "
        "and their bookkeeping (the slot maps, which every split needs, come on top). Hits per lookup of all tables.",
        after='Columns after "measured" are points by which a prediction is too high.',
    )


def _serve(
    traffic: Sequence[Traffic], access: Mapping[str, AccessProfile], share: float, folder: Path
) -> tuple[list[int], list[TableReads]]:
    tables = [each.table for each in traffic]
    write_tables(folder / "snapshot", tables, 1)
    slots_bytes = sum((share * t.rows + 1) * slot_bytes(t.row_bytes) for t in tables)
    with TurboSSDInferenceModule.from_embedding_specs(
        tables,
        ssd_directory=folder,
        hbm_budget_gb=(slots_bytes + SLOT_MAP_BYTES_PER_ROW * sum(t.rows for t in tables)) / _GIB,
        cache_hit_rate=1.0,
        access=dict(access),
        device="cpu",
    ) as module:
        module.load_snapshot(folder / "snapshot")
        reads = second_half_of_module(module, traffic)
        return list(module.slots.values()), reads


__all__ = ["mixed_section"]
