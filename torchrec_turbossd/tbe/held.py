"""A batch whose rows stay in their slots, so that its lookup is one launch that a CUDA graph can capture."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchrec_turbossd.errors import ClosedError, InputError, StoreError
from torchrec_turbossd.tbe.device_lookups import DeviceLookupRows, Hold
from torchrec_turbossd.tbe.stock_lookup import StockLookup

T = TypeVar("T")
CheckWeights = Callable[[Tensor | None, Tensor], Tensor | None]


class HeldBatch:
    """Made by `hold` of a serving TBE or module. One thread at a time; a context manager that releases.

    Its rows count as looked up when they are brought in. While they are held they are of one version: an update shows
    in the next `run` or `lookup`, another snapshot in the next `bring`.
    """

    def __init__(
        self, rows: DeviceLookupRows, look: StockLookup, check: CheckWeights, indices: Tensor, offsets: Tensor
    ) -> None:
        self._rows, self._look, self._check_weights = rows, look, check
        rows.layout.check_form(indices, offsets)
        id_type = torch.int32 if rows.device.type == "cuda" else torch.int64
        # They outlive a caller's inference mode.
        with torch.inference_mode(False):
            self._slots = torch.zeros(indices.shape, dtype=id_type, device=rows.device)
            self._offsets = torch.zeros(offsets.shape, dtype=id_type, device=rows.device)
        self._brought = False
        self._hold: Hold | None = None
        self._dropped: weakref.finalize[Any, Any] | None = None
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
            self._hold = self._rows.hold(batch, (self._slots[: indices.numel()], self._offsets))
            # A batch that is dropped must not keep its slots for ever.
            self._dropped = weakref.finalize(self, self._rows.release_later, self._hold)
            self._dropped.atexit = False
        else:
            batch.place()
            with self._rows.alone_on_stream():
                self._offsets.zero_()
        self._brought = True

    def lookup(self, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look the batch up: a launch, which may be captured.

        Args:
            per_sample_weights: floating, as many as the first batch had indices. A graph that is captured reads
                float32 weights where they are, others where a copy is made.

        Raises:
            InputError: weights that do not fit.
            ClosedError: no batch is held. StoreError: one of its rows could not be updated.
        """
        weights = self._check_weights(per_sample_weights, self._slots)
        if self._slots.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._check()
            return self._look(self._slots, self._offsets, weights)
        return self.run(lambda: self._look(self._slots, self._offsets, weights))

    def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, a captured graph's `replay` for one: launched in order with updates and other lookups.

        Raises `ClosedError` and `StoreError` as `lookup`.
        """
        with self._rows.alone_on_stream():
            self._check()
            return work()

    def release(self) -> None:
        """Let the rows go."""
        self._brought = False
        if self._hold is not None and self._dropped is not None:
            self._dropped.detach()
            hold, self._hold = self._hold, None
            self._rows.release(hold)

    def _check(self) -> None:
        if not self._brought:
            raise ClosedError("no batch is held; call bring with one, or hold another")
        if self._hold is not None and self._hold.spoilt:
            raise StoreError(
                "a row of the batches held could not be updated in its slot; call bring with the batch again"
            )

    def __enter__(self) -> HeldBatch:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.release()


__all__ = ["HeldBatch"]
