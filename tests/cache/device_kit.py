"""A device-resident cache and what it takes to use it: PyTorch operators, or Triton kernels that are interpreted."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

from torchrec_turbossd.cache import device_cache
from torchrec_turbossd.cache.device_cache import DeviceCache
from torchrec_turbossd.cache.device_reference import TorchOps
from torchrec_turbossd.errors import CacheFullError

if not torch.cuda.is_available():
    # Read when kernels are first imported.
    os.environ["TRITON_INTERPRET"] = "1"

CPU = torch.device("cpu")
_NO_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
BOTH = [
    pytest.param("cpu", "torch", id="torch"),
    pytest.param("cpu", "triton", id="triton", marks=_NO_TRITON),
    pytest.param("cuda", "torch", id="torch-cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", id="triton-cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted programs are slow."""
    if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        monkeypatch.setattr("torchrec_turbossd.cache.kernels_rows.EXCHANGE_ROWS", 32)


class Tables:
    """Two kinds of parts a row, several features a table, and a store that is a dict."""

    def __init__(
        self,
        where: tuple[str, str],
        slots: list[int],
        dram: list[int] | None,
        features: list[int],
        rows: list[int],
        *,
        ahead: bool = False,
        changes: bool = True,
    ) -> None:
        device, kind = where
        if kind == "triton" and device == "cpu" and torch.cuda.is_available():
            pytest.skip("with a GPU here kernels are compiled, not interpreted")
        self.ahead = ahead
        self.device, self.rows, self.features = torch.device(device), rows, features
        self.widths = [[8, 4] if t % 2 else [12, 12] for t in range(len(rows))]
        self.parts = [
            [torch.zeros(n + 1, width, dtype=torch.uint8, device=self.device) for width in self.widths[t]]
            for t, n in enumerate(slots)
        ]
        self.cache = DeviceCache(
            rows,
            slots,
            self.parts,
            row_bytes=[sum(each) for each in self.widths],
            dram_slots=dram,
            feature_table=features,
            changes=changes,
        )
        if kind == "torch":
            self.cache.ops = TorchOps(self.cache.state)
        else:
            from torchrec_turbossd.cache.device_triton import TritonOps

            self.cache.ops = TritonOps(self.cache.state)
        self.stored = [torch.zeros(n, sum(w), dtype=torch.uint8) for n, w in zip(rows, self.widths, strict=True)]
        self.live = [each.clone() for each in self.stored]

    def row(self, table: int, slots: Tensor) -> Tensor:
        return torch.cat([part[slots.to(self.device)].cpu() for part in self.parts[table]], dim=1)

    def write_back(self, table: int, ids: Tensor, rows: Tensor) -> None:
        self.stored[table][ids] = rows

    def bring(self, ids: Tensor, offsets: Tensor, bags: int, *, mark: bool) -> tuple[device_cache.Batch, list[int]]:
        """A whole batch, as its users do it: (batch, distinct rows of each table that were in no slot)."""
        cache = self.cache
        slots = torch.full((ids.numel(),), -7, dtype=torch.int64, device=self.device)
        batch = cache.remap(ids.to(self.device), offsets.to(self.device), bags, slots, mark=mark)
        if self.ahead:
            cache.bring_ahead(batch)
        first = found = cache.found()
        assert not found.flags
        while not found.all_here:
            try:
                absent = cache.bring(batch, found)
            except CacheFullError:
                cache.give_up(batch)
                raise
            if not absent:
                break
            for table, wanted in absent:
                cache.put(table, wanted, self.stored[table][wanted], self.write_back)
            cache.again(batch)
            found = cache.found()
        return batch, (first.in_dram + first.absent).tolist()

    def put_in_slots(self, table: int, ids: Tensor, slots: Tensor) -> None:
        """Rows as the store has them, in slots that were taken out."""
        at = 0
        for part in self.parts[table]:
            part[slots] = self.stored[table][ids][:, at : at + part.shape[1]].to(self.device)
            at += part.shape[1]
        self.cache.admit(table, ids.to(self.device), slots)

    def change(self, table: int, slots: Tensor, ids: Tensor) -> None:
        """Training: other bytes for the rows of `ids` [N], which are in `slots` [N]."""
        rows = torch.randint(0, 256, (ids.numel(), sum(self.widths[table])), dtype=torch.uint8)
        at = 0
        for part in self.parts[table]:
            part[slots.to(self.device)] = rows[:, at : at + part.shape[1]].to(self.device)
            at += part.shape[1]
        self.live[table][ids] = rows


def steps_of(device: str, kind: str, steps: int) -> int:
    """Fewer where kernels are interpreted."""
    return steps // 2 if (device, kind) == ("cpu", "triton") else steps
