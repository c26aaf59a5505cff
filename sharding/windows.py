"""How much of a table passes through memory at once: rows by bytes, and a refusal of what cannot fit."""

from __future__ import annotations

from collections.abc import Iterator

from torchrec_turbossd.cache.host_memory import free_bytes
from torchrec_turbossd.errors import BudgetError

WINDOW_BYTES = 16 << 20
"""Bytes of one window: the largest tensor of rows that saving or loading makes."""

STEP_BYTES = 1 << 20
"""Bytes of rows that are read or written at once to fill a window. Rows never written are computed in int64, which
takes many times their bytes, and stays in the processor's cache at this size."""


def window_rows(row_bytes: int) -> int:
    """Rows of `row_bytes` bytes in one window; at least one."""
    return max(1, WINDOW_BYTES // max(1, row_bytes))


def step_rows(row_bytes: int) -> int:
    """Rows of `row_bytes` bytes that are read or written at once; at least one."""
    return max(1, min(STEP_BYTES, WINDOW_BYTES) // max(1, row_bytes))


def windows(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, number) of runs of at most `size` rows that make up `count`."""
    for first in range(0, count, size):
        yield first, min(size, count - first)


def check_memory(nbytes: int, what: str) -> None:
    """Raise `BudgetError` when `nbytes` are more than the machine has free; where it does not say so, nothing."""
    free = free_bytes()
    if nbytes > WINDOW_BYTES and free is not None and nbytes > free:
        raise BudgetError(
            f"{what} take {nbytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free; read slices of "
            "rows, or save with torch.distributed.checkpoint.save or save_snapshot, which go window by window, as "
            "async_save does with async_stager=TurboSSDStager()"
        )


__all__ = ["STEP_BYTES", "WINDOW_BYTES", "check_memory", "step_rows", "window_rows", "windows"]
