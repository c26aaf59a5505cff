"""What the demo found: checks and figures as they come, one table at the end, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.console import Console
from rich.table import Table

from torchrec_turbossd.planner import PlanRow

if TYPE_CHECKING:
    from demo_serving import Lookup, Swap
    from demo_training import Record

_SSD, _MEMORY, _OLD, _NEW = "#1f77b4", "#222222", "#8c8c8c", "#2ca02c"
_TABLE_COLOURS = ("#ff7f0e", "#9467bd", "#17becf", "#e377c2")


class Report:
    """Collects figures and checks; whatever is collected is printed at once."""

    def __init__(self) -> None:
        self.console = Console(width=None if Console().is_terminal else 110, highlight=False)
        self.figures: list[tuple[str, str]] = []
        self.checks: list[tuple[str, str, bool]] = []

    @property
    def held(self) -> bool:
        """Whether every check held."""
        return all(held for *_, held in self.checks)

    def title(self, text: str) -> None:
        self.console.rule(f"[bold]{text}", align="left")

    def say(self, text: str) -> None:
        self.console.print(text)

    def figure(self, what: str, value: str) -> None:
        """Note a figure."""
        self.figures.append((what, value))
        self.console.print(f"  {what}: [bold]{value}")

    def check(self, what: str, compared: str, held: bool) -> None:
        """Note whether something that must be so is so, and what was compared to find out."""
        self.checks.append((what, compared, held))
        self.console.print(f"  {_verdict(held)} {what} ({compared})")

    def plan(self, rows: Sequence[PlanRow]) -> None:
        """Print a sharding plan."""
        table = Table(title="Where the planner put the tables", title_justify="left")
        for column in ("table", "rank", "sharding", "rows are in"):
            table.add_column(column)
        for column in ("rows", "slots", "MB of memory", "MB on SSD", "predicted hit rate"):
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(
                row.table,
                str(row.rank),
                row.sharding_type,
                row.tier,
                "-" if row.rows is None else f"{row.rows:,}",
                "all rows" if row.slots is None else f"{row.slots:,}",
                "-" if row.fast_bytes is None else _megabytes(row.fast_bytes),
                _megabytes(row.ssd_bytes) if row.ssd_bytes else "-",
                "-" if row.hit_rate is None else f"{row.hit_rate:.1%}",
            )
        self.console.print(table)

    def summary(self) -> None:
        """Print everything once more as one table."""
        table = Table(title="What was measured and checked", title_justify="left")
        table.add_column("what")
        table.add_column("figure")
        for what, value in self.figures:
            table.add_row(what, value)
        table.add_section()
        for what, compared, held in self.checks:
            table.add_row(what, f"{_verdict(held)} {compared}")
        self.console.print(table)

    def save(self, path: Path) -> None:
        """Write figures and checks to `path` as JSON."""
        checks = [{"what": what, "compared": compared, "held": held} for what, compared, held in self.checks]
        path.write_text(json.dumps({"figures": dict(self.figures), "checks": checks}, indent=1) + "\n")


def draw(path: Path, ssd: Record, memory: Record, predicted: dict[str, float], swap: Swap) -> None:
    """Write a picture of loss, hit rates and the swap to `path`."""
    figure = Figure(figsize=(16, 4.6), layout="constrained")
    loss, hits, lookups = figure.subplots(1, 3)
    _draw_loss(loss, ssd, memory)
    _draw_hit_rates(hits, ssd, predicted)
    _draw_swap(lookups, swap)
    for axes in (loss, hits, lookups):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


def _draw_loss(axes: Axes, ssd: Record, memory: Record) -> None:
    axes.plot(ssd.losses.mean(0).numpy(), color=_SSD, linewidth=4.0, alpha=0.45, label="tables on SSD")
    axes.plot(memory.losses.mean(0).numpy(), color=_MEMORY, linewidth=0.9, label="all tables in memory")
    difference = float((ssd.losses - memory.losses).abs().max())
    axes.set_title(f"Training loss (largest difference: {difference:g})")
    axes.set_xlabel("training step")
    axes.set_ylabel("cross-entropy [nats per token]")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_hit_rates(axes: Axes, ssd: Record, predicted: dict[str, float]) -> None:
    for (table, hits), colour in zip(ssd.hits.items(), _TABLE_COLOURS, strict=False):
        rates = (100.0 * hits / ssd.reads[table]).numpy()
        axes.plot(rates, color=colour, linewidth=1.6, label=f"{table}, measured")
        axes.axhline(
            100 * predicted[table], color=colour, linestyle="--", linewidth=1.2, label=f"{table}, predicted once warm"
        )
    axes.set_title("Lookups answered from memory")
    axes.set_xlabel("training step")
    axes.set_ylabel("hit rate [% of lookups]")
    axes.set_ylim(0, 100)
    if ssd.hits:
        axes.legend(frameon=False, loc="lower right")


def _draw_swap(axes: Axes, swap: Swap) -> None:
    axes.axvspan(0, 1e3 * swap.seconds, color="#f2d388", alpha=0.5, label="load_snapshot runs")
    for label, colour, generation in (("old snapshot", _OLD, "old"), ("new snapshot", _NEW, "new")):
        chosen = [lookup for lookup in swap.lookups if lookup.answer == generation]
        axes.scatter(*_points(chosen, swap.started), s=7, color=colour, label=f"answer from the {label}")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Leaves the legend room.
    axes.set_ylim(low, 6 * high)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title("Lookups through a snapshot swap")
    axes.set_xlabel("time since load_snapshot began [ms]")
    axes.set_ylabel("time of one lookup [ms]")
    axes.legend(frameon=False, loc="upper right")


def _points(lookups: Sequence[Lookup], origin: float) -> tuple[list[float], list[float]]:
    return [1e3 * (one.ended - origin) for one in lookups], [1e3 * one.seconds for one in lookups]


def _verdict(held: bool) -> str:
    return "[green]✓[/]" if held else "[bold red]✗ FAILED[/]"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


__all__ = ["Report", "draw"]
