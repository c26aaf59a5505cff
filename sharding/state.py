"""`state_dict` and `load_state_dict` of SSD-backed tables: lazy rows in TorchRec's keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.types import ParameterSharding

from torchrec_turbossd.errors import InputError
from torchrec_turbossd.sharding.lazy_rows import LazyRows, RowColumns, sharded_rows
from torchrec_turbossd.sharding.local_tables import LocalTable
from torchrec_turbossd.tables import TRAINING_TYPES, TableSpec
from torchrec_turbossd.tbe.training import TurboSSDTableBatchedEmbeddingBags


def weight_windows(local: Iterable[LocalTable]) -> list[tuple[LocalTable, LazyRows]]:
    """The weights of SSD-backed local shards as lazy rows."""
    return [
        (table, LazyRows(RowColumns(table.owner, table.place)))
        for table in local
        if isinstance(table.owner, TurboSSDTableBatchedEmbeddingBags)
    ]


def sharded_weight(
    table: TableSpec, sharding: ParameterSharding, local: Iterable[LocalTable], group: ProcessGroup | None
) -> ShardedTensor:
    """The weight of one SSD-backed table as a ShardedTensor of lazy rows."""
    windows = [(t.metadata, rows) for t, rows in weight_windows(local) if t.shard.table.name == table.name]
    spec: Any = sharding.sharding_spec
    return sharded_rows(windows, spec.shards, [table.rows, table.dim], TRAINING_TYPES[table.data_type], group)


def load_weight(name: str, value: Any, local: Iterable[LocalTable]) -> None:
    """Write a loaded weight into this rank's shards of a table.

    Args:
        value: a ShardedTensor with the same shards, or a whole [rows, dim] tensor.

    Raises:
        InputError: a value of another kind, shape or sharding; then nothing was written.
    """
    pairs = []
    for table, rows in weight_windows(local):
        if table.shard.table.name == name:
            pairs.append((rows, _part(name, value, table)))
    for rows, part in pairs:
        rows.copy_(part)


def _part(name: str, value: Any, table: LocalTable) -> Tensor:
    shard = table.shard
    if isinstance(value, ShardedTensor):
        for held in value.local_shards():
            same_place = list(held.metadata.shard_offsets) == list(table.metadata.shard_offsets)
            if same_place and list(held.metadata.shard_sizes) == list(table.metadata.shard_sizes):
                return held.tensor
        raise InputError(
            f"table {name!r}: the loaded ShardedTensor has no shard at {list(table.metadata.shard_offsets)} of "
            f"{list(table.metadata.shard_sizes)}; load it under the same plan, or give the whole tensor"
        )
    whole = (shard.table.rows, shard.table.dim)
    if isinstance(value, Tensor) and tuple(value.shape) == whole:
        rows = value[shard.row_offset : shard.row_offset + shard.rows]
        return rows[:, shard.col_offset : shard.col_offset + shard.cols]
    found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise InputError(f"table {name!r}: a loaded weight must be a ShardedTensor or a {whole} tensor, got {found}")


def consume_weights(state_dict: dict[str, Any], prefix: str, names: Iterable[str], local: list[LocalTable]) -> None:
    """Take the weights of SSD-backed tables out of a state dict on its way to `load_state_dict`.

    What is left under each key is what the table's empty parameter expects, so that no key counts as missing.
    """
    for name in names:
        key = f"{prefix}{name}.weight"
        if key in state_dict:
            load_weight(name, state_dict[key], local)
            state_dict[key] = torch.empty(0)


__all__ = ["consume_weights", "load_weight", "sharded_weight", "weight_windows"]
