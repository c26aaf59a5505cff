"""Hit-rate curves of the tables on SSD as a picture, with what the plan chose on each."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from torchrec_turbossd.cli.plan import Planned
from torchrec_turbossd.cli.quantities import human_count
from torchrec_turbossd.cli.report import TableReport
from torchrec_turbossd.sizing import Curve

MOST_CURVES = 12
_POINTS = 200
_LONGEST_NAME = 28


def draw_plan(planned: Planned) -> tuple[list[str], bytes]:
    """The names of the tables in the picture, and the picture as PNG; nothing where no table is on SSD.

    There are at most twelve curves: those of the tables on SSD that are looked up most. The x axis is the share of a
    table's rows that have a slot, the y axis the hit rate per lookup; a dot is what the plan gives a shard.
    """
    chosen = [(number, table) for number, table in enumerate(planned.report.tables) if table.tier == "SSD"]
    if not chosen:
        return [], b""
    chosen.sort(key=lambda one: (-one[1].lookups, one[1].name))
    shown = chosen[:MOST_CURVES]
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    lowest = min(_lowest(table) for _, table in shown)
    colours = colormaps["tab20" if len(shown) > 10 else "tab10"].colors  # type: ignore[attr-defined]
    for place, (number, table) in enumerate(shown):
        colour = colours[place % len(colours)]
        shares = np.geomspace(max(lowest, 1 / table.rows), 1.0, _POINTS)
        rates = 100 * _curve(planned, number).hit_rate(shares * table.shards[0].rows)
        axes.plot(100 * shares, rates, color=colour, linewidth=1.6, label=_label(table))
        points = sorted({(shard.slots / shard.rows, shard.hit_rate) for shard in table.shards if shard.slots})
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.scatter([100 * v for v in x], [100 * v for v in y], color=colour, edgecolors="black", s=46, zorder=3)
    axes.set_xscale("log")
    axes.set_xlim(100 * lowest, 110)
    axes.set_ylim(0, 102)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter())
    memory, rest = planned.report.machine.fast_memory, len(chosen) - len(shown)
    axes.set_xlabel(f"rows with a slot in {memory}")
    axes.set_ylabel("lookups whose row is in a slot")
    axes.set_title(f"Hit rates of tables on SSD{_besides(rest)}", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside right upper",
        title="dots: what the plan gives the parts of a table",
        title_fontsize=9,
        alignment="left",
        frameon=False,
        fontsize=9,
    )
    picture = BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return [table.name for _, table in shown], picture.getvalue()


def _curve(planned: Planned, number: int) -> Curve:
    """Of a table's first shard: with equal shares of slots, its hit rate is the whole table's."""
    option = planned.options[number]
    return planned.access.curve(option, option.shards[0])


def _lowest(table: TableReport) -> float:
    """Where a curve begins to be of interest: a hundredth of what the plan gives."""
    return max(1e-6, min(0.01, table.slot_share / 100))


def _label(table: TableReport) -> str:
    half = (_LONGEST_NAME - 2) // 2
    name = table.name if len(table.name) <= _LONGEST_NAME else f"{table.name[:half]}..{table.name[-half:]}"
    # Matplotlib leaves labels that begin with an underscore out of legends.
    name = f" {name}" if name.startswith("_") else name
    return f"{name.replace('$', chr(92) + '$')}: {table.hit_rate:.1%}, {human_count(table.slots or 0)} slots"


def _besides(rest: int) -> str:
    return f": the {MOST_CURVES} looked up most, of {rest + MOST_CURVES:,}" if rest else ""


__all__ = ["MOST_CURVES", "draw_plan"]
