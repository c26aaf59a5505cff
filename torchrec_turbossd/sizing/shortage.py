"""Memory that runs out while it is taken, said in terms of the budgets that decide how much that is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchrec_turbossd.errors import BudgetError

_SAID = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|not enough memory", re.IGNORECASE)


@contextmanager
def named_budgets(device: torch.device, fast: str, host: str) -> Iterator[None]:
    """Let `BudgetError` come out of a block that runs out of memory; other errors stay as they are.

    Args:
        device: where slots are.
        fast: what to change where they did not fit, after "; ".
        host: the same where host memory did not: the DRAM tier of a GPU.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise BudgetError(f"{device} has no room for the slots: {_first_line(error)}; {fast}") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _SAID.search(str(error)):
            raise
        what, advice = ("the slots", fast) if device.type == "cpu" else ("the DRAM tier", host)
        raise BudgetError(f"the host has no room for {what}: {_first_line(error)}; {advice}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


__all__ = ["named_budgets"]
