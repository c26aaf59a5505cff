"""Misses of ten unlike tables by how a budget is split among them: `python -m benchmarks.budget_split`.

Slots by `split_budget`, which knows the first half of the traffic, against rules of thumb with as many bytes; misses of
the second half are counted while the tables are served. Three small tables are compared with every possible split.
Exits with 1 when a rule of thumb does better, or when a split is more than 1 % from the best.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fbgemm_gpu.split_embedding_configs import SparseType
from matplotlib.figure import Figure as Picture

from benchmarks import page as pages
from benchmarks.brute_force import small_section
from benchmarks.context import Context
from benchmarks.measured import Traffic, overall, second_halves
from benchmarks.page import Page, Section
from benchmarks.splits import OURS, RULES, all_splits, expected_misses, items_of, spent
from benchmarks.streams import Ints, Zipf, drifting
from benchmarks.traffic import dlrm_ids
from torchrec_turbossd.tables import TableSpec

SHARES = (0.02, 0.05, 0.10, 0.20)
"""Budgets, as parts of the bytes of all rows with their slots' bookkeeping."""

TO_BEAT = RULES[:2]
"""The rules that must not do better; the others inform."""

_PROGRAM = "benchmarks.budget_split"


@dataclass(frozen=True)
class Kind:
    """rows (0: as many as the traffic asks for), dim: of a table. batch: lookups. alpha: its Zipf exponent."""

    rows: int
    dim: int
    batch: int
    alpha: float = 0.0
    popularity: str = "Zipf"


KINDS = {
    "mild": Kind(80_000, 16, 32, 0.7),
    "mild, wide": Kind(40_000, 128, 64, 0.8),
    "small": Kind(2_000, 32, 16, 0.9),
    "wide": Kind(8_000, 128, 32, 0.95),
    "busy, thin": Kind(60_000, 8, 128, 1.0),
    "usual": Kind(32_000, 64, 32, 1.05),
    "usual, busy": Kind(16_000, 16, 96, 1.1),
    "steep": Kind(100_000, 32, 16, 1.3),
    "DLRM": Kind(0, 64, 64, popularity="DLRM reuse"),
    "drifting": Kind(40_000, 32, 48, 1.05, popularity="drifting Zipf"),
}


def traffic_of(context: Context) -> list[Traffic]:
    """Every table with its lookups; all of as many batches."""
    batches, part = context.pick((1_200, 1), (80, 20))
    made = []
    for place, (name, kind) in enumerate(KINDS.items()):
        ids = _ids(kind, kind.rows // part, batches * kind.batch, context.seed + place)
        rows = kind.rows // part or int(ids.max()) + 1
        table = TableSpec(name=name, rows=rows, dim=kind.dim, data_type=SparseType.INT8)
        made.append(Traffic(table=table, ids=ids, batch=kind.batch))
    return made


def _ids(kind: Kind, rows: int, count: int, seed: int) -> Ints:
    if kind.popularity == "DLRM reuse":
        return dlrm_ids(count, seed)
    if kind.popularity == "drifting Zipf":
        return drifting(rows, kind.alpha, seed, count)
    return Zipf(rows, kind.alpha, seed).draw(count)


def measure(context: Context, traffic: Sequence[Traffic]) -> Iterator[dict[str, Any]]:
    """For each budget: slots, misses per lookup, and what the curves expected, by way of splitting."""
    items = items_of(traffic)
    whole = spent(items, [each.table.rows for each in traffic])
    # The least slots of all tables take more than little of a quick run's small tables.
    shares = context.pick(SHARES, (0.3,))
    splits = [all_splits(items, int(share * whole)) for share in shares]
    columns = zip(*(slots for split in splits for slots in split.values()), strict=True)
    with context.scratch("budgets") as folder:
        by_table = second_halves(traffic, [list(column) for column in columns], folder)
    reads = iter(zip(*by_table, strict=True))
    lookups = sum(each.batch for each in traffic)
    for share, split in zip(shares, splits, strict=True):
        yield {
            "budget": share,
            "bytes": int(share * whole),
            "slots": split,
            "bytes spent": {name: spent(items, slots) for name, slots in split.items()},
            "expected": {name: expected_misses(items, slots) / lookups for name, slots in split.items()},
            "measured": {name: 1 - overall(next(reads)) for name in split},
        }


def sections(traffic: Sequence[Traffic], found: Sequence[dict[str, Any]]) -> Iterator[Section]:
    """Misses by budget, and the slots that make them."""
    rows = []
    for one in found:
        ours = one["measured"][OURS]
        others = [f"{one['measured'][rule]:.2%} ({one['measured'][rule] / ours:.2f})" for rule in RULES]
        rows.append([f"{one['budget']:.0%}", f"{one['expected'][OURS]:.2%}", f"{ours:.2%}", *others])
    yield Section(
        title="Misses of ten tables",
        columns=["budget", "ours, expected", "ours", *RULES],
        rows=rows,
        before="Lookups that miss, of all lookups of the second half; in parentheses, times ours. Every way spends the "
        "same bytes and gives each table the slots of one batch at least. The budget is a share of what all rows with "
        "their slots' bookkeeping would take; slot maps, which every way needs, come on top.",
        after=f"Ours knows the first half of the traffic. It must beat {' and '.join(TO_BEAT)}. "
        "“Same share of rows” is what a rule like FBGEMM's, rows x hit rate, gives.",
    )
    yield Section(
        title="The tables, and slots by `split_budget`",
        columns=[
            "table",
            "rows",
            "INT8 x",
            "lookups a batch",
            "popularity",
            *(f"{one['budget']:.0%}" for one in found),
        ],
        rows=[
            [
                each.table.name,
                f"{each.table.rows:,}",
                str(each.table.dim),
                str(each.batch),
                f"{kind.popularity} {kind.alpha or ''}".strip(),
                *(f"{one['slots'][OURS][place]:,}" for one in found),
            ]
            for place, (each, kind) in enumerate(zip(traffic, KINDS.values(), strict=True))
        ],
    )


def draw(found: Sequence[dict[str, Any]], picture: Picture) -> None:
    """Misses by budget, a line for each way."""
    picture.set_size_inches(7, 4.2)
    panel = picture.subplots()
    shares = [100 * one["budget"] for one in found]
    for name in (OURS, *RULES):
        missed = [100 * one["measured"][name] for one in found]
        panel.plot(shares, missed, "o-", linewidth=2.2 if name == OURS else 1.2, label=name)
    panel.plot(shares, [100 * one["expected"][OURS] for one in found], "k:", label=f"{OURS}, expected")
    panel.set_xscale("log")
    panel.set_xticks(shares, [f"{share:.0f} %" for share in shares])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel("budget, share of all bytes")
    panel.set_ylabel("lookups that miss, %")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)


def run(page: Page, context: Context) -> list[dict[str, Any]]:
    """All sections; returns what to draw."""
    traffic = traffic_of(context)
    found = list(measure(context, traffic))
    page.data["budgets"] = found
    page.data["tables"] = [each.table.name for each in traffic]
    for one in found:
        ours = one["measured"][OURS]
        page.missed += [
            f"{one['budget']:.0%} of the bytes: {rule} misses {one['measured'][rule]:.2%}, ours {ours:.2%}"
            for rule in TO_BEAT
            if one["measured"][rule] <= ours
        ]
    for section in sections(traffic, found):
        page.add(section)
    best = min(float(np.min([one["measured"][rule] / one["measured"][OURS] for rule in TO_BEAT])) for one in found)
    page.say(f"The rules to beat miss {best:.2f} times as often, or more.")
    page.add(small_section(page, context))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns 1 where a goal was missed, in a run that is not quick."""
    given = pages.parser(_PROGRAM, __doc__).parse_args(arguments)
    page, context = pages.start("A budget split among tables", given, _PROGRAM, arguments)
    found = run(page, context)
    kept = page.save(
        given.out, f"{page.about['date']}-{given.label}-budget-split", lambda picture: draw(found, picture)
    )
    page.say(f"{'; '.join(page.missed) or 'Every goal was reached'}. Written: {kept}")
    return 1 if page.missed and not given.quick else 0


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["KINDS", "SHARES", "TO_BEAT", "Kind", "draw", "main", "measure", "run", "sections", "traffic_of"]
