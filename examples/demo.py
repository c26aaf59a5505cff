"""Train, serve, update and exchange embedding tables that do not fit in the memory they are given.

Run it with `python examples/demo.py`; it takes a minute or two, and exits with 0 only when every check held.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.multiprocessing
from demo_report import Report, draw
from demo_serving import serve
from demo_settings import Settings, parse_arguments, pick_device, quiet_libraries
from demo_training import ChangedRows, Record, train_rank
from source_tokens import TABLES, SampleStream, read_standard_library

from torchrec_turbossd.planner import TURBO_SSD

_PARAMETER_BYTES = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    given = parse_arguments(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out.resolve()
    with ExitStack() as folders:
        scratch = _folder(folders, out)
        settings = Settings(
            steps=given.steps,
            batch_size=given.batch_size,
            budget_mb=given.budget_mb,
            ranks=given.ranks,
            seed=given.seed,
            device=pick_device(given.ranks),
            out=out,
            scratch=scratch,
            ssd_directory=_folder(folders, given.ssd_directory) if given.ssd_directory else scratch,
        )
        report = Report()
        try:
            run(settings, report)
        except torch.multiprocessing.ProcessRaisedException as error:
            refusal = str(error).rstrip().rpartition("\n")[2]
            if not refusal.startswith("torchrec_turbossd.errors."):
                raise
            report.say(f"[bold red]{refusal}")
            return 1
    report.summary()
    report.save(out / "figures.json")
    report.say(f"Picture: {out / 'demo.png'}, figures: {out / 'figures.json'}")
    report.say("[bold green]Every check held." if report.held else "[bold red]Not every check held; see above.")
    return 0 if report.held else 1


def run(settings: Settings, report: Report) -> None:
    """All parts in order."""
    torch.set_num_threads(1)
    quiet_libraries()
    started = time.perf_counter()
    stream = _read(settings, report)
    ssd, memory = _train(settings, report)
    predicted = _report_training(settings, ssd, memory, report)
    serving = time.perf_counter()
    swap = serve(settings, stream, report)
    report.figure("time of the serving parts", f"{time.perf_counter() - serving:.0f} s")
    draw(settings.out / "demo.png", ssd, memory, predicted, swap)
    report.figure("time of the whole demo", f"{time.perf_counter() - started:.0f} s")


def _folder(folders: ExitStack, parent: Path) -> Path:
    """A new folder in `parent` that goes when the demo ends, and takes nothing else with it."""
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="run-", dir=parent)).resolve()
    folders.callback(shutil.rmtree, path, ignore_errors=True)
    return path


def _read(settings: Settings, report: Report) -> SampleStream:
    report.title("The standard library's source becomes training data")
    started = time.perf_counter()
    corpus = read_standard_library()
    corpus.save(settings.scratch / "corpus")
    rows = sum(rows for rows, _ in TABLES.values())
    size = sum(rows * (dim + 1) * _PARAMETER_BYTES for rows, dim in TABLES.values())
    report.figure("tokens read", f"{len(corpus):,} in {time.perf_counter() - started:.1f} s")
    report.figure("tables", f"{len(TABLES)} of {rows:,} rows, {size / 1e6:,.0f} MB with optimizer state")
    report.figure("memory budget for them", f"{settings.ranks} x {settings.budget_mb} MiB on {settings.device.upper()}")
    return SampleStream(corpus, settings.seed)


def _train(settings: Settings, report: Report) -> tuple[Record, Record]:
    report.title(f"{settings.ranks} ranks train on SSD, then the same in memory")
    started = time.perf_counter()
    torch.multiprocessing.spawn(train_rank, (settings,), nprocs=settings.ranks)
    report.figure("time of both runs", f"{time.perf_counter() - started:.0f} s")
    ssd, memory = (torch.load(settings.scratch / run / "record.pt", weights_only=False) for run in ("ssd", "memory"))
    return ssd, memory


def _report_training(settings: Settings, ssd: Record, memory: Record, report: Report) -> dict[str, float]:
    """Returns the predicted hit rate of each table on SSD."""
    report.plan(ssd.plan)
    tail = max(1, settings.steps // 10)
    loss, accuracy = ssd.losses.mean(0), ssd.accuracies.mean(0)
    first, last = float(loss[:tail].mean()), float(loss[-tail:].mean())
    report.figure("loss, first and last tenth of the steps", f"{first:.3f}, {last:.3f} nats per token")
    report.figure(
        "accuracy, first and last tenth", f"{float(accuracy[:tail].mean()):.1%}, {float(accuracy[-tail:].mean()):.1%}"
    )
    report.figure("time of a step, median", f"{_milliseconds(ssd)} on SSD, {_milliseconds(memory)} all in memory")
    on_ssd = [row for row in ssd.plan if row.compute_kernel == TURBO_SSD]
    predicted = {table: _predicted(ssd, table) for table in ssd.hits}
    for table, rate in predicted.items():
        measured = float(ssd.hits[table][-tail:].sum() / ssd.reads[table][-tail:].sum())
        report.figure(f"hit rate of {table!r}", f"{measured:.1%} in the last tenth, {rate:.1%} predicted once warm")
    report.check(
        "the planner put what does not fit on SSD", f"{len(on_ssd)} of {len(ssd.plan)} shards", held=bool(on_ssd)
    )
    report.check("the model learns", f"loss fell from {first:.3f} to {last:.3f}", held=last < first)
    difference = float((ssd.losses - memory.losses).abs().max())
    report.check(
        "losses on SSD are those in memory, bit for bit",
        f"largest difference of {ssd.losses.numel():,} losses: {difference:g}",
        held=torch.equal(ssd.losses, memory.losses),
    )
    _check_rows(settings, report)
    _check_memory(settings, ssd, report)
    return predicted


def _predicted(record: Record, table: str) -> float:
    """The planner's hit rate of a whole table; its shards are asked in proportion to their rows."""
    shards = [row for row in record.plan if row.table == table]
    rows = sum(row.rows or 0 for row in shards)
    return sum((row.hit_rate or 0.0) * (row.rows or 0) for row in shards) / rows


def _check_rows(settings: Settings, report: Report) -> None:
    phase = list(settings.phases)[-1]
    ssd: ChangedRows = torch.load(settings.scratch / "ssd" / f"{phase}.pt")
    memory: ChangedRows = torch.load(settings.scratch / "memory" / f"{phase}.pt")
    pairs = [(rows, memory[table][1]) for table, (_, rows) in ssd.items()]
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    report.check(
        "so are the rows that the last steps trained",
        f"largest difference of {sum(a.numel() for a, _ in pairs):,} weights: {largest:g}",
        held=all(torch.equal(a, b) for a, b in pairs),
    )


def _check_memory(settings: Settings, record: Record, report: Report) -> None:
    resident = [row for row in record.plan if row.compute_kernel != TURBO_SSD]
    taken = [
        slots + sum(row.fast_bytes or 0 for row in resident if row.rank == rank)
        for rank, slots in enumerate(record.slot_bytes)
    ]
    report.check(
        "the tables took no more memory than the budget",
        f"at most {max(taken) / (1 << 20):.1f} of {settings.budget_mb} MiB on a rank",
        held=max(taken) <= settings.budget_bytes,
    )


def _milliseconds(record: Record) -> str:
    return f"{1e3 * float(record.seconds.median()):.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
