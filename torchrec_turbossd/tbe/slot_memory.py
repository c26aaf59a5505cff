"""Rows in and out of the slots of a stock TBE, as bytes on the CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor


class SlotMemory(ABC):
    """Slots of a module's tables as rows of bytes."""

    @abstractmethod
    def read(self, table: int, slots: Tensor) -> Tensor:
        """Rows in `slots` [N] int64, on any device: [N, row_bytes] uint8 on the CPU."""

    @abstractmethod
    def parts(self, table: int) -> list[Tensor]:
        """The parts of a row, in the order of its bytes, as views: [slots + 1, bytes] uint8 each."""

    def slot_bytes(self, table: int) -> int:
        """Bytes that one slot takes, padding included."""
        return sum(part.stride(0) for part in self.parts(table))

    @abstractmethod
    def write(self, table: int, slots: Tensor, rows: Tensor) -> None:
        """Put `rows` [N, row_bytes] uint8 into distinct `slots` [N] int64; both on any device."""


class TrainingMemory(SlotMemory):
    """Weights, then optimizer state, of a training TBE.

    Everything goes through `.data`: a write that bumped the version counter would make the backward of a batch in
    flight raise.
    """

    def __init__(self, tbe: SplitTableBatchedEmbeddingBagsCodegen) -> None:
        weights = tbe.split_embedding_weights()
        states = tbe.split_optimizer_states() or [()] * len(weights)
        self._parts = [[w.data, *(s.data for s in state)] for w, state in zip(weights, states, strict=True)]

    def read(self, table: int, slots: Tensor) -> Tensor:
        parts = self._parts[table]
        slots = slots.to(parts[0].device)
        columns = [_as_bytes(part.index_select(0, slots)) for part in parts]
        return torch.cat(columns, dim=1).cpu()

    def parts(self, table: int) -> list[Tensor]:
        return [(part if part.dim() == 2 else part.unsqueeze(1)).view(torch.uint8) for part in self._parts[table]]

    def write(self, table: int, slots: Tensor, rows: Tensor) -> None:
        parts = self._parts[table]
        rows, slots = rows.to(parts[0].device), slots.to(parts[0].device)
        widths = [part[:1].numel() * part.element_size() for part in parts]
        columns = torch.split(rows, widths, dim=1)
        # All copies are made before the first slot changes, so that running out of memory changes none.
        values = [
            column.contiguous().view(part.dtype).view(-1, *part.shape[1:])
            for column, part in zip(columns, parts, strict=True)
        ]
        for part, value in zip(parts, values, strict=True):
            part.index_copy_(0, slots, value)


class ServingMemory(SlotMemory):
    """Rows of an inference TBE, in its own layout; padding behind a row is left alone."""

    def __init__(self, tbe: IntNBitTableBatchedEmbeddingBagsCodegen, row_bytes: list[int]) -> None:
        whole = tbe.split_embedding_weights_with_scale_bias(split_scale_bias_mode=0)
        self._tables = [weights[:, :size] for (weights, _, _), size in zip(whole, row_bytes, strict=True)]

    def read(self, table: int, slots: Tensor) -> Tensor:
        source = self._tables[table]
        return source.index_select(0, slots.to(source.device)).cpu()

    def parts(self, table: int) -> list[Tensor]:
        return [self._tables[table]]

    def write(self, table: int, slots: Tensor, rows: Tensor) -> None:
        target = self._tables[table]
        target.index_copy_(0, slots.to(target.device), rows.to(target.device))


def _as_bytes(part: Tensor) -> Tensor:
    """[N] or [N, C] of any type to [N, bytes] uint8."""
    columns = part if part.dim() == 2 else part.unsqueeze(1)
    return columns.contiguous().view(torch.uint8)


__all__ = ["ServingMemory", "SlotMemory", "TrainingMemory"]
