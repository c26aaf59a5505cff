"""Measure this package on a CPU, each row against a named peer: `python -m benchmarks.run`, or `make bench`."""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import bulk_load, latency, lookup, machine, mapped, policies, rocks_options, store_reads, training_step
from benchmarks.context import Context
from benchmarks.figures import Figure
from benchmarks.report import Report

_ROOT = Path(__file__).absolute().parents[1]


@dataclass(frozen=True)
class Row:
    """What a row measures, in words, and how; `asked` rows run only when `--only` names them."""

    title: str
    measure: Callable[[Context], Iterator[Figure]]
    asked: bool = False


ROWS = {
    "lookup": Row("Lookups with every row in slots", lookup.run),
    "store-cached": Row("Rows read from the serving store, page cache warm", store_reads.run_cached),
    "store-cold": Row("Rows read from the serving store, caches dropped", store_reads.run_cold),
    "bulk-load": Row("Rows written as a serving snapshot", bulk_load.run),
    "latency": Row("Lookups under updates and snapshot swaps", latency.run),
    "swap-hits": Row("Hit rate after a snapshot swap", latency.run_swap_hits),
    "policies": Row("Hit rates of the eviction policies", policies.run),
    "training-step": Row("Training steps against whole tables in memory", training_step.run),
    "mapped-file": Row("Slots against a memory-mapped file, in equal memory", mapped.run),
    "rocks-options": Row("RocksDB settings, one at a time", rocks_options.run, asked=True),
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    asked = ", ".join(name for name, row in ROWS.items() if row.asked)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        epilog=f"Rows: {', '.join(ROWS)}. Only by --only: {asked}.",
    )
    parser.add_argument("--quick", action="store_true", help="small and short: shows that all works, measures little")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(ROWS), help="these rows")
    parser.add_argument("--out", type=Path, help="where results go (benchmarks; bench-out unless the run is whole)")
    parser.add_argument(
        "--directory", type=Path, default=_ROOT / "bench-out", help="data files, on the disk to measure (bench-out)"
    )
    parser.add_argument(
        "--trace", type=Path, nargs="+", default=[], help="files of ids to replay: text, or text in .xz"
    )
    parser.add_argument(
        "--label", default=platform.node() or "host", help="the machine's name in file names (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=20260101, help="of every random number (%(default)s)")
    given = parser.parse_args(arguments)
    if given.out is None:
        given.out = _ROOT / ("bench-out" if given.quick or given.only else "benchmarks")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows; returns 1 when one of them raised, 0 otherwise, whether or not goals were reached."""
    given = parse_arguments(arguments)
    given.directory.mkdir(parents=True, exist_ok=True)
    names = given.only or [name for name, row in ROWS.items() if not row.asked]
    report = Report(_about(given, arguments))
    context = Context(
        quick=given.quick,
        directory=given.directory.resolve(),
        seed=given.seed,
        traces=tuple(given.trace),
        say=report.say,
    )
    for name in names:
        report.measure(name, ROWS[name].title, partial(ROWS[name].measure, context))
    report.about["load after"] = machine.load()
    report.summary()
    counts = report.counts
    data, page = report.save(given.out, f"{report.about['date']}-{given.label}-cpu")
    report.say(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f". Written: {data} and {page}")
    return 1 if counts["error"] else 0


def _about(given: argparse.Namespace, arguments: Sequence[str] | None) -> dict[str, object]:
    given_words = sys.argv[1:] if arguments is None else arguments
    # Files are named without their folders, which are nobody's business.
    words = [Path(word).name if "/" in word else word for word in given_words]
    return {
        "label": given.label,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.run", *words]),
        "quick": given.quick,
        "seed": given.seed,
        "commit": machine.commit(),
        "machine": machine.describe(given.directory),
        "versions": machine.versions(),
        "rows": {name: row.title for name, row in ROWS.items()},
        "load before": machine.load(),
    }


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["ROWS", "main", "parse_arguments"]
