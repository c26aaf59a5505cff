"""What the demo is told on its command line."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run of the demo; every process gets a copy.

    Attributes:
        steps: training steps before the first snapshot.
        batch_size: samples of one rank in one step.
        budget_mb: MiB of fast memory that the tables of one rank may take.
        ranks: training processes.
        seed: of initial rows, dense weights and the order of the samples.
        device: "cpu", or "cuda" where every rank has a GPU of its own.
        out: where results stay.
        scratch: where snapshots and the in-memory reference go until the demo ends.
        ssd_directory: where the live tables are until the demo ends.
    """

    steps: int
    batch_size: int
    budget_mb: int
    ranks: int
    seed: int
    device: str
    out: Path
    scratch: Path
    ssd_directory: Path

    @property
    def phases(self) -> dict[str, range]:
        """The steps up to the first snapshot, from there to the update, and from there to the second snapshot."""
        updated = self.steps + max(2, self.steps // 60)
        refreshed = updated + max(2, self.steps // 10)
        return {"train": range(self.steps), "update": range(self.steps, updated), "refresh": range(updated, refreshed)}

    @property
    def budget_bytes(self) -> int:
        return self.budget_mb << 20


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; says what is wrong and exits where it makes no sense."""
    parser = argparse.ArgumentParser(
        description="Train, serve, update and exchange embedding tables that do not fit in the memory they are given.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=_positive, default=300, help="training steps before the first snapshot")
    parser.add_argument("--batch-size", type=_positive, default=1024, help="samples of one rank in one step")
    parser.add_argument("--budget-mb", type=_positive, default=32, help="MiB of fast memory for the tables of a rank")
    parser.add_argument("--ranks", type=_positive, default=2, help="training processes")
    parser.add_argument("--seed", type=int, default=0, help="of initial rows, dense weights and sample order")
    parser.add_argument(
        "--ssd-directory", type=Path, default=None, help="where live tables go; by default, under --out"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the results go")
    return parser.parse_args(arguments)


def pick_device(ranks: int) -> str:
    """ "cuda" where there is a GPU for every rank, else "cpu"."""
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "cpu"


def quiet_libraries() -> None:
    """Leave out what PyTorch and TorchRec tell each other's developers."""
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", message="To copy construct from a tensor", category=UserWarning)
    for library in ("torch.fx", "torchrec"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


__all__ = ["Settings", "parse_arguments", "pick_device", "quiet_libraries"]
