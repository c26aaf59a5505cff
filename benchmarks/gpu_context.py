"""What every row of the GPU benchmark is given: the device, the time left, and modules that several rows use."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.context import Context
from benchmarks.figures import SkipRow

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GpuContext(Context):
    """One run.

    Attributes:
        device: to measure.
        ends: on the monotonic clock, when no further case may begin.
        kept: modules and streams by name, made by the first row that needs them.
    """

    device: torch.device
    ends: float = float("inf")
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def keep(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gave when the name was first asked for."""
        if name not in self.kept:
            self.kept[name] = make()
        kept: T = self.kept[name]
        return kept

    def check_time(self) -> None:
        """Raise `SkipRow` when the time of the whole run is over."""
        if time.monotonic() > self.ends:
            raise SkipRow("no time left in this run; name the row with --only, or raise --budget")


class Narrow:
    """Batches with 32-bit ids, which stock kernels take without a conversion."""

    def __init__(self, batches: Sequence[Tensor], offsets: Tensor) -> None:
        # The batches are held, so that no other tensor can have their names.
        self._batches = {id(batch): (batch, batch.int()) for batch in batches}
        self.offsets = offsets.int()

    def __getitem__(self, batch: Tensor) -> Tensor:
        return self._batches[id(batch)][1]

    def caller(self, module: Callable[[Tensor, Tensor], object]) -> Callable[[Sequence[Tensor]], None]:
        """Looks batches up in a stock module."""

        def work(batches: Sequence[Tensor]) -> None:
            for batch in batches:
                module(self[batch], self.offsets)

        return work


def caller(module: Callable[[Tensor, Tensor], object], offsets: Tensor) -> Callable[[Sequence[Tensor]], None]:
    """Looks batches up in a module."""

    def work(batches: Sequence[Tensor]) -> None:
        for batch in batches:
            module(batch, offsets)

    return work


__all__ = ["GpuContext", "Narrow", "caller"]
