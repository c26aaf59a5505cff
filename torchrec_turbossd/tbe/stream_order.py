"""What runs on several CUDA streams in the order that slots need, without a wait of the host."""

from __future__ import annotations

import threading

import torch

from torchrec_turbossd.cache.current_stream import CurrentStream


class StreamOrder:
    """Two chains of work on the device: on the account of slots, and on the rows in them. On a CPU it does nothing.

    Work on the account never overlaps with itself. Rows are written into slots after whoever used what was there; who
    uses them comes after the account that says where they are. As long as one stream does it all, nothing is waited
    for, nor recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._current = CurrentStream(device.index or 0) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._last: dict[str, torch.cuda.Stream] = {}

    def after_account(self) -> None:
        """What this thread launches next comes after the account's last work."""
        self._follow("account")

    def after_rows(self) -> None:
        """What this thread launches next comes after the last use of rows."""
        self._follow("rows")

    def account_changed(self) -> None:
        """What was launched last worked on the account."""
        self._follow("account", now_last=True)

    def rows_used(self) -> None:
        """What was launched last used rows, or changed them."""
        self._follow("rows", now_last=True)

    def _follow(self, chain: str, *, now_last: bool = False) -> None:
        if self._current is None:
            return
        current = self._current()
        with self._lock:
            last = self._last.get(chain)
            if last is not None and last is not current and last != current:
                # One stream stands for all that came before.
                current.wait_stream(last)
            if now_last:
                self._last[chain] = current


__all__ = ["StreamOrder"]
