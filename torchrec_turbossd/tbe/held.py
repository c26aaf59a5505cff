"""A batch whose rows stay in their slots, so that its lookup is one launch that a CUDA graph can capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchrec_turbossd.errors import ClosedError, InputError
from torchrec_turbossd.tbe.device_lookups import DeviceLookupRows
from torchrec_turbossd.tbe.stock_lookup import StockLookup

T = TypeVar("T")


class HeldBatch:
    """Made by `hold` of a serving TBE or module. One thread at a time; a context manager that releases.

    Its rows count as looked up when they are brought in. While they are held they are of one version: an update shows
    in the next `run` or `lookup`, another snapshot in the next `bring`.
    """

    def __init__(self, rows: DeviceLookupRows, look: StockLookup, indices: Tensor, offsets: Tensor) -> None:
        self._rows, self._look = rows, look
        id_type = torch.int32 if rows.device.type == "cuda" else torch.int64
        self._slots = torch.zeros(indices.shape, dtype=id_type, device=rows.device)
        self._offsets = torch.zeros(offsets.shape, dtype=id_type, device=rows.device)
        self._release: Callable[[], None] | None = None
        self.bring(indices, offsets)

    def bring(self, indices: Tensor, offsets: Tensor) -> None:
        """Let the rows of another batch be held in place of this one's; a graph that was captured looks them up.

        Args:
            indices: [M], M no more than the first batch had. offsets: as many as the first batch had.

        Raises:
            InputError, RowIndexError: as a lookup. CacheFullError: the rows do not fit in the slots. Nothing is held
                then.
        """
        self.release()
        batch = self._rows.place(indices, offsets)
        if offsets.shape != self._offsets.shape or indices.numel() > self._slots.numel():
            raise InputError(
                f"a held batch has {self._offsets.numel()} offsets and at most {self._slots.numel()} indices, as it "
                f"was made with, got {offsets.numel()} and {indices.numel()}; hold another batch"
            )
        if batch.lookups_and_bags:
            self._release = self._rows.hold(batch, (self._slots[: indices.numel()], self._offsets))
            return
        batch.place()
        self._offsets.zero_()
        self._release = _nothing

    def lookup(self, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look the batch up: a launch, which may be captured.

        Args:
            per_sample_weights: float32, as many as the first batch had indices.
        """
        self._check()
        if self._slots.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._look(self._slots, self._offsets, per_sample_weights)
        return self.run(lambda: self._look(self._slots, self._offsets, per_sample_weights))

    def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, a captured graph's `replay` for one: launched in order with updates and other lookups."""
        self._check()
        with self._rows.alone_on_stream():
            return work()

    def release(self) -> None:
        """Let the rows go."""
        if self._release is not None:
            release, self._release = self._release, None
            release()

    def _check(self) -> None:
        if self._release is None:
            raise ClosedError("no batch is held; call bring with one, or hold another")

    def __enter__(self) -> HeldBatch:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.release()


def _nothing() -> None:
    """A batch without lookups holds no rows."""


__all__ = ["HeldBatch"]
