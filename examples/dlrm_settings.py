"""What the DLRM example is told on its command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo_settings import pick_device
from dlrm_day import CATEGORICAL


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run; every process gets a copy.

    Attributes:
        criteo: a click log in Criteo's format, or None for a generated day.
        samples: of the day; of a file, at most these.
        most_rows: of each table, [26].
        dim: width of all tables.
        batch_size: samples of one rank in one step.
        steps: where training stops; None: when all samples but those held out have been learnt from once.
        evaluations: times that the AUC is measured, the last one at the end.
        budget_mb: MiB of fast memory that the tables of one rank may take.
        ranks: training processes.
        seed: of the generated day, initial rows and dense weights.
        device: "cpu", or "cuda" where every rank has a GPU of its own.
        compare: train the same with all tables in memory.
        resume: a checkpoint to go on from, or None.
        out: where results and the checkpoint stay.
        ssd_directory: where the live tables are until the run ends; None: in the scratch folder.
    """

    criteo: Path | None
    samples: int
    most_rows: tuple[int, ...]
    dim: int
    batch_size: int
    steps: int | None
    evaluations: int
    budget_mb: int
    ranks: int
    seed: int
    device: str
    compare: bool
    resume: Path | None
    out: Path
    ssd_directory: Path | None

    @property
    def global_batch(self) -> int:
        """Samples of all ranks in one step."""
        return self.ranks * self.batch_size

    @property
    def budget_bytes(self) -> int:
        return self.budget_mb << 20


DEFAULTS = {"samples": 1 << 20, "rows": (1_000_000,), "batch_size": 1024, "evaluations": 8, "budget_mb": 40}
QUICK = {"samples": 1 << 15, "rows": (50_000,), "batch_size": 256, "evaluations": 4, "budget_mb": 3}
"""What `--quick` changes, unless it is given too."""


def parse_arguments(arguments: Sequence[str] | None = None) -> Settings:
    """The command line; says what is wrong and exits where it makes no sense."""
    parser = _parser()
    given = parser.parse_args(arguments)
    for name, value in (QUICK if given.quick else DEFAULTS).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    ranks = _ranks(parser, given.ranks)
    if len(given.rows) not in (1, CATEGORICAL):
        parser.error(f"argument --rows: one number for all tables, or {CATEGORICAL}; got {len(given.rows)}")
    if given.criteo is not None and not given.criteo.is_file():
        parser.error(f"argument --criteo: no such file: {given.criteo}")
    if given.resume is not None and not given.resume.is_dir():
        parser.error(f"argument --resume: no such folder: {given.resume}")
    if given.resume is not None and not (given.resume / "dense.pt").is_file():
        inside = sorted(str(path.parent) for path in given.resume.glob("checkpoint-*/dense.pt"))
        parser.error(
            f"argument --resume: {given.resume} holds no checkpoint" + (f"; give {inside[-1]}" if inside else "")
        )
    for name in ("out", "ssd_directory"):
        folder = getattr(given, name)
        if folder is not None and folder.exists() and not folder.is_dir():
            parser.error(f"argument --{name.replace('_', '-')}: not a folder: {folder}")
    if given.samples < 2 * ranks * given.batch_size:
        parser.error(
            f"argument --samples: {given.samples} are too few; a step takes {ranks * given.batch_size} and as many are "
            "held out: give more samples, or a smaller --batch-size"
        )
    return Settings(
        criteo=given.criteo,
        samples=given.samples,
        most_rows=tuple(given.rows) * (CATEGORICAL // len(given.rows)),
        dim=given.dim,
        batch_size=given.batch_size,
        steps=given.steps,
        evaluations=given.evaluations,
        budget_mb=given.budget_mb,
        ranks=ranks,
        seed=given.seed,
        device=pick_device(int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) if launched() else ranks),
        compare=not given.no_compare,
        resume=given.resume,
        out=given.out.resolve(),
        ssd_directory=given.ssd_directory,
    )


def launched() -> bool:
    """Whether torchrun, or another launcher, started this process as one of several ranks."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train TorchRec's DLRM with its big tables on SSD, and compare with all tables in memory.",
        epilog="Under torchrun the ranks are its own. On CUDA where every rank has a GPU of its own, else on the CPU.",
    )
    add = parser.add_argument
    add("--criteo", type=Path, help="a click log in Criteo's format, plain or .gz; by default, a day is generated")
    add("--samples", type=_positive, help=_default("samples of the day, or most lines of the file", "samples"))
    add("--rows", type=_rows, help=_default("most rows of a table: a number, or 26 with commas between", "rows"))
    add("--dim", type=_width, default=16, help="width of the tables, a multiple of 4 (16)")
    add("--batch-size", type=_positive, help=_default("samples of one rank in one step", "batch_size"))
    add("--steps", type=_positive, help="where training stops; by default, when all samples were seen once")
    add("--evaluations", type=_positive, help=_default("times that the AUC is measured", "evaluations"))
    add("--budget-mb", type=_positive, help=_default("MiB of fast memory for the tables of a rank", "budget_mb"))
    add("--ranks", type=_positive, help="training processes (2)")
    add("--seed", type=_not_negative, default=0, help="of the generated day, initial rows and dense weights (0)")
    add("--no-compare", action="store_true", help="leave out the same training with all tables in memory")
    add(
        "--resume",
        type=Path,
        help="go on from a checkpoint-N folder under --out, with the arguments that it had and more --steps, or none",
    )
    add("--ssd-directory", type=Path, help="where live tables go; by default, under --out")
    add("--out", type=Path, default=Path("demo-out/dlrm"), help="where the results go (demo-out/dlrm)")
    add("--quick", action="store_true", help="a small day and small tables: half a minute instead of minutes")
    return parser


def _default(text: str, name: str) -> str:
    usual, quick = (_said(values[name]) for values in (DEFAULTS, QUICK))
    return f"{text} ({usual}; with --quick {quick})"


def _said(value: object) -> str:
    return str(value[0] if isinstance(value, tuple) else value)


def _ranks(parser: argparse.ArgumentParser, wanted: int | None) -> int:
    if not launched():
        return wanted or 2
    running = int(os.environ["WORLD_SIZE"])
    if wanted not in (None, running):
        parser.error(f"argument --ranks: the launcher started {running}, got {wanted}; leave it out")
    return running


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _positive(text: str) -> int:
    if _number(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


def _not_negative(text: str) -> int:
    if _number(text) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return int(text)


def _width(text: str) -> int:
    if _positive(text) % 4:
        raise argparse.ArgumentTypeError(f"must be a multiple of 4, as FBGEMM's tables are, got {text}")
    return int(text)


def _rows(text: str) -> tuple[int, ...]:
    rows = tuple(_number(part) for part in text.split(","))
    if not all(2 <= n < 1 << 31 for n in rows):
        raise argparse.ArgumentTypeError(f"must be 2 or more and below 2**31, got {text}")
    return rows


__all__ = ["DEFAULTS", "QUICK", "Settings", "launched", "parse_arguments"]
