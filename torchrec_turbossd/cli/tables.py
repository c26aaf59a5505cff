"""A plan as text for people: what goes where, why, and how well it will do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from torchrec_turbossd.cli.output import Output
from torchrec_turbossd.cli.quantities import human_count, human_ms, human_ranks, human_size, human_speed
from torchrec_turbossd.cli.report import MachineReport, PlanReport, RankReport, TableReport
from torchrec_turbossd.planner import Machine

Row = TypeVar("Row", RankReport, TableReport)
_PLAIN_WIDTH = 120
_UNLIMITED = 4000
_NAMED = 5
_LONGEST_NAME = 32


@dataclass(frozen=True)
class _Column(Generic[Row]):
    """A column: its head, its cells, and when it goes where there is no room: the highest first, 0 never."""

    head: str
    cell: Callable[[Row], str]
    goes: int = 0
    left: bool = False


def print_plan(report: PlanReport, *, top: int | None = 20, console: Console | None = None) -> None:
    """Print a report: colours and lines in a terminal, plain text elsewhere; columns that do not fit are left out.

    Args:
        report: the plan.
        top: how many tables and ranks to show; None: all.
        console: where to; None: standard output.
    """
    out = console or _standard_output()
    _say(out, _headline(report), style="bold")
    _say(out, _expected(report))
    _print_ranks(out, report, top)
    _print_tables(out, report, top)
    for line in _explanations(report):
        _say(out, line)
    for warning in report.warnings:
        _say(out, f"Warning: {warning}", style="bold red")


def print_measured(machine: Machine, *, console: Console | None = None) -> None:
    """Print what a host has, and how that was measured."""
    out = console or _standard_output()
    _say(out, f"This host, {machine.compute_device}, as each of {_number(machine.local_world_size, 'rank')} sees it:")
    for note in machine.notes:
        _say(out, f"  {note}")


def _headline(report: PlanReport) -> str:
    machine = report.machine
    hosts = machine.ranks // machine.ranks_per_host
    where = f"{_number(machine.ranks, 'rank')} on {_number(hosts, 'host')}"
    return (
        f"{_number(len(report.tables), 'table')} on {where} ({machine.device}), {report.batch_size:,} samples a rank, "
        f"{report.optimizer}"
    )


def _expected(report: PlanReport) -> str:
    memory, slowest = report.machine.fast_memory, report.ranks[report.slowest_rank]
    on_ssd = report.hit_rate_on_ssd
    prefetched = report.batches_in_flight > 1 and slowest.ms.ssd > 0
    beside = ", side by side, as batches are prefetched" if prefetched else ""
    of_ssd = "" if on_ssd is None else f", {on_ssd:.2%} of those of tables on SSD"
    if report.dram_hit_rate_on_ssd:
        of_ssd += f", {report.dram_hit_rate_on_ssd:.2%} more in DRAM"
    return (
        f"{_of_a_rank(report.machine)}; {report.machine.reserve:.0%} of {memory} kept back for other things than "
        "tables.\n"
        f"Expected: {report.hit_rate:.2%} of {human_count(report.lookups)} lookups of a step find their row in {memory}"
        f"{of_ssd}. The tables' part of a step takes {human_ms(report.step_ms)} ms on rank {report.slowest_rank}, the "
        f"slowest: {human_ms(slowest.ms.total - slowest.ms.ssd)} for compute and network, "
        f"{human_ms(slowest.ms.ssd)} for {_slower(report)}{beside}."
    )


def _slower(report: PlanReport) -> str:
    """What rows come from that are not in a slot."""
    return "DRAM and SSD" if _has_tier(report) else "SSD"


def _has_tier(report: PlanReport) -> bool:
    return any(table.dram_slots for table in report.tables)


def _of_a_rank(machine: MachineReport) -> str:
    parts = (
        [f"{human_size(machine.hbm_bytes)} of HBM ({human_speed(machine.hbm_bandwidth)})"] if machine.hbm_bytes else []
    )
    parts.append(f"{human_size(machine.dram_bytes)} of DRAM ({human_speed(machine.dram_bandwidth)})")
    reads = f"{machine.ssd_reads_per_second:,.0f} reads/s, {human_speed(machine.ssd_bandwidth)}"
    return f"Each rank has {', '.join(parts)} and {human_size(machine.ssd_bytes)} of SSD ({reads})"


def _print_ranks(out: Console, report: PlanReport, top: int | None) -> None:
    memory = report.machine.fast_memory
    columns: list[_Column[RankReport]] = [
        _Column("rank", lambda rank: str(rank.rank)),
        _Column(f"{memory} used", lambda rank: human_size(rank.fast_used_bytes)),
        _Column("free", lambda rank: human_size(rank.fast_free_bytes), 4),
        _Column("SSD", lambda rank: _or_dash(rank.ssd_used_bytes), 3),
        _Column("tables", lambda rank: f"{rank.tables:,}", 5),
        _Column("lookups", lambda rank: human_count(rank.lookups), 6),
        _Column("hit rate", lambda rank: f"{rank.hit_rate:.2%}", 2),
        _Column("compute ms", lambda rank: human_ms(rank.ms.compute), 7),
        _Column("network ms", lambda rank: human_ms(rank.ms.communication), 8),
        _Column("miss ms" if _has_tier(report) else "SSD ms", lambda rank: human_ms(rank.ms.ssd), 1),
        _Column("step ms", lambda rank: human_ms(rank.step_ms)),
    ]
    if any(rank.dram_used_bytes for rank in report.ranks):
        columns.insert(3, _Column("DRAM", lambda rank: _or_dash(rank.dram_used_bytes), 9))
    slowest = sorted(report.ranks, key=lambda rank: (-rank.step_ms, rank.rank))
    shown = sorted(slowest[:top], key=lambda rank: rank.rank)
    _print(out, "Ranks", columns, shown)
    if len(shown) < len(report.ranks):
        _say(out, f"and {_number(len(report.ranks) - len(shown), 'rank')} with less time (--all shows all)")


def _print_tables(out: Console, report: PlanReport, top: int | None) -> None:
    memory = report.machine.fast_memory
    columns: list[_Column[TableReport]] = [
        _Column("table", lambda table: _name(out, table.name), left=True),
        _Column("rows", lambda table: human_count(table.rows), 5),
        _Column("dim", lambda table: str(table.dim), 6),
        _Column("rows are in", lambda table: table.tier, left=True),
        _Column("sharding", lambda table: table.sharding_type.removesuffix("_wise"), 4, left=True),
        _Column("ranks", lambda table: human_ranks(table.ranks), 3),
        _Column("slots", lambda table: "all" if table.slots is None else human_count(table.slots), 7),
        _Column("of rows", lambda table: f"{table.slot_share:.1%}", 1),
        _Column(memory, lambda table: human_size(table.fast_bytes)),
        _Column("SSD", lambda table: _or_dash(table.ssd_bytes), 2),
        _Column("lookups", lambda table: human_count(table.lookups), 8),
        _Column("hit rate", lambda table: f"{table.hit_rate:.2%}"),
        _Column("ms", lambda table: human_ms(table.ms.total)),
    ]
    if any(table.dram_bytes for table in report.tables):
        columns.insert(9, _Column("DRAM", lambda table: _or_dash(table.dram_bytes), 9))
    if _has_tier(report):
        columns.insert(
            8, _Column("in DRAM", lambda table: human_count(table.dram_slots) if table.dram_slots else "-", 8)
        )
        columns.insert(-1, _Column("from DRAM", lambda table: f"{table.dram_hit_rate:.2%}" if table.slots else "-", 1))
    order = sorted(report.tables, key=lambda t: (-t.ms.total, -t.fast_bytes - t.ssd_bytes, t.module, t.name))
    _print(out, "Tables, those that take longest first", columns, order[:top])
    rest = order[top:] if top is not None else []
    if rest:
        fast, ssd = sum(table.fast_bytes for table in rest), sum(table.ssd_bytes for table in rest)
        on_ssd = sum(table.tier == "SSD" for table in rest)
        _say(
            out,
            f"and {_number(len(rest), 'table')} with less time, {on_ssd:,} of them on SSD: {human_size(fast)} of "
            f"{memory}, {human_size(ssd)} of SSD (--all shows all)",
        )


def _explanations(report: PlanReport) -> list[str]:
    lines = _why(report)
    more, memory = report.one_more_gib, report.machine.fast_memory
    if more is not None:
        lines.append(
            f"One more GiB of {memory} on each rank, with the tables where they are: {more.hit_rate:.2%} of lookups "
            f"instead of {report.hit_rate:.2%}, and at most {human_ms(more.ssd_ms)} ms for {_slower(report)} on a rank "
            f"instead of {human_ms(more.ssd_ms_now)}."
        )
    stores = max(rank.store_bytes for rank in report.ranks)
    if stores:
        lines.append(f"On top of this, row stores take up to {human_size(stores)} of DRAM on a rank.")
    return lines


def _why(report: PlanReport) -> list[str]:
    on_ssd = [table for table in report.tables if table.tier == "SSD"]
    if not on_ssd:
        return [f"All tables fit in {report.machine.fast_memory}, so that none is on SSD."]
    lines: list[str] = []
    forced = [table for table in on_ssd if table.forced]
    chosen = sorted((table for table in on_ssd if not table.forced), key=_asked_for)
    stay = sorted((table for table in report.tables if table.tier != "SSD" and not table.forced), key=_asked_for)
    if forced:
        lines.append(f"On SSD by their constraints: {_named(table.name for table in forced)}.")
    if chosen:
        least = all(table.lookups_per_mib <= stay[0].lookups_per_mib for table in chosen) if stay else True
        why = "because least asked for by byte" if least else "in the quickest plan that was found"
        said = _named(f"{table.name} ({_per_mib(table)})" for table in chosen)
        lines.append(f"On SSD, {why}; lookups of a step for each MiB of all their rows: {said}.")
        if stay:
            lines[-1] += (
                f" Of those in {report.machine.fast_memory}, {stay[0].name} has the fewest, {_per_mib(stay[0])}."
            )
    return lines


def _asked_for(table: TableReport) -> tuple[float, str]:
    return table.lookups_per_mib, table.name


def _per_mib(table: TableReport) -> str:
    value = table.lookups_per_mib
    return human_count(value) if value >= 0.01 or value == 0 else f"{value:.1g}"


def _named(names: Iterable[str]) -> str:
    every = list(names)
    rest = f" and {len(every) - _NAMED:,} more" if len(every) > _NAMED else ""
    return ", ".join(every[:_NAMED]) + rest


def _print(out: Console, title: str, columns: Sequence[_Column[Row]], rows: Sequence[Row]) -> None:
    """The table with as many columns as there is room for."""
    room = out.width if out.is_terminal or "COLUMNS" in os.environ else _UNLIMITED
    kept = list(columns)
    table = _rich_table(out, title, kept, rows)
    while Measurement.get(out, out.options.update_width(_UNLIMITED), table).maximum > room:
        last = max(kept, key=lambda column: column.goes)
        if not last.goes:
            break
        kept.remove(last)
        table = _rich_table(out, title, kept, rows)
    if out.is_terminal:
        out.print(table)
    else:
        # Rich pads lines to the end.
        plain = Console(markup=False, highlight=False, emoji=False, width=room, color_system=None)
        with plain.capture() as captured:
            plain.print(table)
        body: list[str] = [line.rstrip() for line in captured.get().splitlines()]
        out.print("\n".join(["", title, *body]), soft_wrap=True)
    if len(kept) < len(columns):
        gone = ", ".join(column.head for column in columns if column not in kept)
        _say(out, f"no room for {gone}: --json has all")


def _rich_table(out: Console, title: str, columns: Sequence[_Column[Row]], rows: Sequence[Row]) -> Table:
    if out.is_terminal:
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    else:
        table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.head, justify="left" if column.left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(column.cell(row)) for column in columns))
    return table


def _standard_output() -> Console:
    """Standard output, which says how wide it is only as a terminal or through COLUMNS."""
    out = Output(markup=False, highlight=False, emoji=False)
    if out.is_terminal or "COLUMNS" in os.environ:
        return out
    return Output(markup=False, highlight=False, emoji=False, width=_PLAIN_WIDTH)


def _say(out: Console, text: str, style: str = "") -> None:
    out.print(Text(text, style=style))


def _name(out: Console, name: str) -> str:
    """In a terminal, long names lose their middle, so that there is room for figures."""
    if not out.is_terminal or len(name) <= _LONGEST_NAME:
        return name
    half = (_LONGEST_NAME - 2) // 2
    return f"{name[:half]}..{name[-half:]}"


def _or_dash(size: int) -> str:
    return human_size(size) if size else "-"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


__all__ = ["print_measured", "print_plan"]
