"""What the DLRM example found: a table of hit rates, figures in JSON, a picture, and one last line that says it all."""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from demo_report import Report
from dlrm_settings import Settings
from dlrm_training import Reads, Record
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

_SSD, _MEMORY = "#1f77b4", "#222222"
_POINTS = 60
"""Of a curve of losses, each a mean of as many steps as it takes."""


def tell(settings: Settings, data: str, ssd: Record, memory: Record | None) -> bool:
    """Print and save what was found; returns whether every check held.

    Args:
        settings: of the run.
        data: what the samples are.
        ssd, memory: what was seen with tables on SSD, and with all in memory where that was run.
    """
    report, figures = Report(), _figures(settings, data, ssd, memory)
    report.title("What was measured")
    if ssd.reads:
        report.console.print(_hit_rates(figures["hit_rates"]))
    first, last = _ends(ssd.losses.mean(0))
    report.figure("loss, first and last tenth of the steps", f"{first:.4f}, {last:.4f}")
    report.figure("AUC of the samples held out", ", ".join(f"{auc:.4f} after {n:,}" for n, auc in ssd.aucs))
    _check(report, settings, ssd, memory)
    (settings.out / "summary.json").write_text(json.dumps({**figures, "held": report.held}, indent=1) + "\n")
    _draw(settings, ssd, memory)
    report.say(f"Picture: {settings.out / 'dlrm.png'}, figures: {settings.out / 'summary.json'}")
    print(_last_line(figures), flush=True)
    return report.held


def _figures(settings: Settings, data: str, ssd: Record, memory: Record | None) -> dict[str, Any]:
    runs = {"ssd": ssd} if memory is None else {"ssd": ssd, "memory": memory}
    return {
        "data": data,
        "device": settings.device,
        "ranks": settings.ranks,
        "batch_size": settings.batch_size,
        "samples": ssd.aucs[-1][0],
        "loss_difference": None if memory is None else float((ssd.losses - memory.losses).abs().max()),
        "losses": {where: run.losses.mean(0).tolist() for where, run in runs.items()},
        "auc": {where: run.aucs for where, run in runs.items()},
        "step_ms": {where: 1e3 * float(run.seconds.median()) for where, run in runs.items()},
        "table_bytes": {where: sum(run.fast_bytes) for where, run in runs.items()},
        "hit_rates": {
            table: {
                "slots": sum(row.slots or 0 for row in ssd.plan if row.table == table),
                "all": _rate(ssd.reads, table),
                "last": _rate(ssd.last_reads, table),
                "predicted": _predicted(ssd, table),
            }
            for table in ssd.reads
        },
    }


def _rate(reads: Reads, table: str) -> float:
    hits, lookups = reads[table]
    return hits / max(1, lookups)


def _predicted(ssd: Record, table: str) -> float:
    """The planner's hit rate of a whole table; its shards are asked in proportion to their rows."""
    shards = [row for row in ssd.plan if row.table == table]
    return sum((row.hit_rate or 0.0) * (row.rows or 0) for row in shards) / sum(row.rows or 0 for row in shards)


def _hit_rates(rates: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Lookups answered from memory, by table on SSD", title_justify="left")
    table.add_column("table")
    for column in ("slots", "all steps", "since the last evaluation", "predicted once warm"):
        table.add_column(column, justify="right")
    for name, rate in rates.items():
        shares = (f"{rate[which]:.1%}" for which in ("all", "last", "predicted"))
        table.add_row(name, f"{rate['slots']:,}", *shares)
    return table


def _check(report: Report, settings: Settings, ssd: Record, memory: Record | None) -> None:
    if not ssd.reads:
        report.say("  [yellow]All tables fit the budget, so none is on SSD; a smaller --budget-mb moves some there.")
    most = max(ssd.fast_bytes)
    report.check(
        "the tables took no more memory than the budget",
        f"at most {_mib(most):.1f} of {settings.budget_mb} MiB on a rank",
        held=most <= settings.budget_bytes,
    )
    if memory is None:
        return
    difference = (
        f"largest difference of {ssd.losses.numel():,} losses: {float((ssd.losses - memory.losses).abs().max()):g}"
    )
    if settings.device == "cpu":
        equal = torch.equal(ssd.losses, memory.losses) and ssd.aucs == memory.aucs
        report.check("losses and AUC on SSD are those in memory, bit for bit", difference, held=equal)
    else:
        report.figure("losses on SSD and in memory", difference)


def _last_line(figures: dict[str, Any]) -> str:
    auc = {where: found[-1][1] for where, found in figures["auc"].items()}
    step, size = figures["step_ms"], {where: _mib(found) for where, found in figures["table_bytes"].items()}
    if "memory" not in auc:
        return f"On SSD: AUC {auc['ssd']:.4f}, {step['ssd']:.1f} ms a step, {size['ssd']:.1f} MiB of memory for tables"
    return (
        f"On SSD against all in memory: losses differ by {figures['loss_difference']:g}; "
        f"AUC {auc['ssd']:.4f} and {auc['memory']:.4f}; "
        f"a step {step['ssd']:.1f} and {step['memory']:.1f} ms ({step['ssd'] / step['memory']:.2f}x); "
        f"tables take {size['ssd']:.1f} and {size['memory']:.1f} MiB of memory ({size['ssd'] / size['memory']:.2f}x)"
    )


def _draw(settings: Settings, ssd: Record, memory: Record | None) -> None:
    """A picture of losses and AUC by samples learnt from."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    loss, auc = figure.subplots(1, 2)
    runs = [(ssd, {"color": _SSD, "linewidth": 4.0, "alpha": 0.45}, "big tables on SSD")]
    if memory is not None:
        runs.append((memory, {"color": _MEMORY, "linewidth": 0.9}, "all tables in memory"))
    for run, style, label in runs:
        places, losses = _curve(run, settings.global_batch)
        loss.plot(places, losses, label=label, **style)
        auc.plot([n / 1e3 for n, _ in run.aucs], [found for _, found in run.aucs], label=label, marker="o", **style)
    _label(loss, "Training loss", "cross-entropy [nats per sample]")
    _label(auc, "Samples held out, the last of the day", "area under the ROC curve")
    FigureCanvasAgg(figure).print_png(str(settings.out / "dlrm.png"))


def _curve(run: Record, step: int) -> tuple[list[float], list[float]]:
    """Thousands of samples learnt from, and mean losses around there."""
    losses = run.losses.mean(0)
    first = run.aucs[-1][0] - losses.numel() * step
    ends = torch.linspace(0, losses.numel(), 1 + min(_POINTS, losses.numel())).long().tolist()
    windows = list(itertools.pairwise(ends))
    places = [(first + 0.5 * step * (start + stop)) / 1e3 for start, stop in windows]
    return places, [float(losses[start:stop].mean()) for start, stop in windows]


def _label(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("samples learnt from [thousands]")
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _ends(values: Tensor) -> tuple[float, float]:
    """Means of the first and of the last tenth."""
    part = max(1, values.numel() // 10)
    return float(values[:part].mean()), float(values[-part:].mean())


def _mib(size: int) -> float:
    return size / (1 << 20)


__all__ = ["tell"]
