"""What every row is given: how much to measure, where files go, seeds and traces."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Context:
    """One run of the benchmarks.

    Attributes:
        quick: small sizes and short times, to see that all works; its figures mean little.
        directory: where row files go, on the disk to measure.
        seed: of every random number.
        traces: files of ids to replay besides the synthetic streams.
        say: prints a line of progress.
    """

    quick: bool
    directory: Path
    seed: int
    traces: tuple[Path, ...] = ()
    say: Callable[[str], None] = print

    def pick(self, whole: T, quick: T) -> T:
        """The value for a whole run, or for a quick one."""
        return quick if self.quick else whole

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A new folder on the disk to measure, removed at the end."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=f"turbossd-bench-{name}-", dir=self.directory))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


__all__ = ["Context"]
