"""Measure this package on an NVIDIA GPU, each row against a named peer: `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import (
    gpu_panels,
    gpu_profile,
    gpu_serving,
    gpu_ssd,
    gpu_training,
    machine,
)
from benchmarks.figures import Figure
from benchmarks.gpu_context import GpuContext
from benchmarks.gpu_report import GpuReport
from benchmarks.gpu_tables import clean_up
from benchmarks.report import free_stem

_ROOT = Path(__file__).absolute().parents[1]
_BUDGET, _QUICK_BUDGET = 210.0, 32.0


@dataclass(frozen=True)
class Row:
    """What a row measures, in words, and how."""

    title: str
    measure: Callable[[GpuContext], Iterator[Figure]]


ROWS = {
    "all-hit": Row("Serving lookups with every row in slots", gpu_serving.run_all_hit),
    "zipf": Row("Serving lookups of a Zipf stream, part of the rows in slots, the rest in DRAM", gpu_serving.run_zipf),
    "training": Row("Training steps with prefetch", gpu_training.run_training),
    "profile": Row("Kernels of a batch, and the share of what memory and bus can move", gpu_profile.run_profile),
    "batch": Row("Serving lookups by batch size", gpu_panels.run_batch),
    "tables": Row("Serving lookups by number of tables, the lookups of all together equal", gpu_panels.run_tables),
    "rows": Row("Serving lookups by rows of the table, few of them asked for", gpu_panels.run_rows),
    "cache-share": Row("Serving lookups by share of rows in slots", gpu_panels.run_cache_share),
    "dynamicemb": Row("dynamicemb's published training step, with fewer rows", gpu_training.run_dynamicemb),
    "ssd": Row("Serving lookups whose missing rows come from SSD", gpu_ssd.run_ssd),
    "nve": Row("NVE's published workload, scaled to the DRAM tier", gpu_serving.run_nve),
}
"""In the order in which time is given to them."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, epilog=f"Rows: {', '.join(ROWS)}."
    )
    parser.add_argument("--quick", action="store_true", help="small and short: shows that all works, measures little")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=list(ROWS), help="these rows")
    parser.add_argument("--out", type=Path, help="where results go (benchmarks; bench-out unless the run is whole)")
    parser.add_argument(
        "--directory", type=Path, default=_ROOT / "bench-out", help="data files, on the disk to measure (bench-out)"
    )
    parser.add_argument("--label", help="the machine's name in file names (the GPU's)")
    parser.add_argument("--seed", type=int, default=20260101, help="of every random number (%(default)s)")
    parser.add_argument(
        "--budget",
        type=float,
        help=f"seconds after which no further case begins ({_BUDGET:g}; quick {_QUICK_BUDGET:g})",
    )
    # A process whose device has failed hands the rows that are left to another, and its results with them.
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.out is None:
        given.out = _ROOT / ("bench-out" if given.quick or given.only else "benchmarks")
    if given.budget is None:
        given.budget = _QUICK_BUDGET if given.quick else _BUDGET
    return given


def gpu_label(name: str) -> str:
    """A GPU's name for files: "NVIDIA H200" is "h200"."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return words.removeprefix("nvidia-") or "gpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows; 0 whether or not goals were reached, 1 when a row raised, 2 without a GPU."""
    begun = time.monotonic()
    given = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu needs an NVIDIA GPU that PyTorch can use, and finds none (torch "
            f"{torch.__version__}); `python -m benchmarks.run` measures a CPU",
            file=sys.stderr,
        )
        return 2
    given.directory.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", torch.cuda.current_device())
    label = given.label or gpu_label(torch.cuda.get_device_name(device))
    about = _about(given, arguments, label, device)
    report = GpuReport(about, folder=given.out, stem=free_stem(given.out, f"{about['date']}-{label}-gpu"))
    if given.resume is not None:
        report.resume(given.resume)
    context = GpuContext(
        quick=given.quick,
        directory=given.directory.resolve(),
        seed=given.seed,
        say=report.say,
        device=device,
        ends=begun + given.budget,
    )
    left = run_rows(list(given.only or ROWS), context, report)
    if left:
        _hand_over(left, given, report, context.ends - time.monotonic())
    report.draw()
    page = report.write()
    report.summary()
    counts = ", ".join(f"{count} {verdict}" for verdict, count in report.counts.items())
    report.say(f"{counts}; {time.monotonic() - begun:.0f} s. Written: {page}")
    return 1 if report.counts["error"] else 0


def run_rows(names: Sequence[str], context: GpuContext, report: GpuReport) -> list[str]:
    """Measure rows, write after each, and return those that were not begun because the device has failed."""
    for place, name in enumerate(names):
        run_row(name, context, report)
        report.write()
        if not _device_works(context):
            return list(names[place + 1 :])
    return []


def run_row(name: str, context: GpuContext, report: GpuReport) -> None:
    """Measure a row; what it cannot do is a figure as well."""

    def figures() -> Iterator[Figure]:
        context.check_time()
        yield from ROWS[name].measure(context)

    for said in report.measure(name, ROWS[name].title, figures):
        report.add(Figure(row=name, case="warning", note=said))
    # What a failed row held may be what the next one needs.
    if report.figures and report.figures[-1].error:
        context.kept.clear()
    _quietly(lambda: clean_up(context.device))


def _quietly(work: Callable[[], object]) -> bool:
    try:
        work()
    except Exception:
        return False
    return True


def _device_works(context: GpuContext) -> bool:
    """No kernel has broken the process: after an illegal access every later call fails."""
    return _quietly(lambda: int(torch.ones(8, device=context.device).sum()))


def _hand_over(left: Sequence[str], given: argparse.Namespace, report: GpuReport, budget: float) -> NoReturn:
    """Become a process that runs the rows that are left: this one's memory is given back, its device works again."""
    report.say(f"the device has failed; a new process goes on with {', '.join(left)}")
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", *left, "--directory", str(given.directory.resolve())]
    command += ["--out", str(given.out.resolve()), "--label", report.about["label"], "--seed", str(given.seed)]
    command += ["--budget", str(max(0.0, budget)), "--resume", str((report.folder / f"{report.stem}.json").resolve())]
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(_ROOT)
    os.execv(sys.executable, [*command, *(["--quick"] if given.quick else [])])


def _about(
    given: argparse.Namespace, arguments: Sequence[str] | None, label: str, device: torch.device
) -> dict[str, Any]:
    given_words = sys.argv[1:] if arguments is None else arguments
    # Files are named without their folders, which are nobody's business.
    words = [Path(word).name if "/" in word else word for word in given_words]
    properties = torch.cuda.get_device_properties(device)
    versions = machine.versions() | {"CUDA": str(torch.version.cuda)}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    size = f"{properties.total_memory / (1 << 30):.0f} GiB"
    return {
        "label": label,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *words]),
        "quick": given.quick,
        "seed": given.seed,
        "commit": machine.commit(),
        "machine": {"gpu": f"{properties.name}, {size}"} | machine.describe(given.directory),
        "versions": versions,
        "rows": {name: row.title for name, row in ROWS.items()},
    }


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["ROWS", "gpu_label", "main", "parse_arguments", "run_row", "run_rows"]
