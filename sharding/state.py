"""`state_dict` and `load_state_dict` of SSD-backed tables: lazy rows in TorchRec's keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.types import ParameterSharding

from torchrec_turbossd.sharding.lazy_rows import LazyRows
from torchrec_turbossd.sharding.lazy_sharded import matching_parts, sharded_rows, write_parts
from torchrec_turbossd.sharding.local_tables import LocalTable
from torchrec_turbossd.sharding.row_columns import LiveRows, RowColumns
from torchrec_turbossd.tables import TRAINING_TYPES, TableSpec
from torchrec_turbossd.tbe.training import TurboSSDTableBatchedEmbeddingBags


def weight_windows(local: Iterable[LocalTable]) -> list[tuple[LocalTable, LazyRows]]:
    """The weights of SSD-backed local shards as lazy rows."""
    return [
        (table, LazyRows(RowColumns(LiveRows(table.owner, table.place))))
        for table in local
        if isinstance(table.owner, TurboSSDTableBatchedEmbeddingBags)
    ]


def sharded_weight(
    table: TableSpec, sharding: ParameterSharding, local: Iterable[LocalTable], group: ProcessGroup | None
) -> ShardedTensor:
    """The weight of one SSD-backed table as a ShardedTensor of lazy rows, which follow training until they are read."""
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
    write_parts(_parts(name, value, local))


def _parts(name: str, value: Any, local: Iterable[LocalTable]) -> list[tuple[LazyRows, Tensor]]:
    held = [(table, rows) for table, rows in weight_windows(local) if table.shard.table.name == name]
    if not held:
        return []
    spec = held[0][0].shard.table
    return matching_parts(
        f"weights of table {name!r}", value, (spec.rows, spec.dim), [(table.metadata, rows) for table, rows in held]
    )


def consume_weights(state_dict: dict[str, Any], prefix: str, names: Iterable[str], local: list[LocalTable]) -> None:
    """Take the weights of SSD-backed tables out of a state dict on its way to `load_state_dict`.

    What is left under each key is what the table's empty parameter expects, so that no key counts as missing. On what
    `load_weight` raises no table was written.
    """
    keys = {name: f"{prefix}{name}.weight" for name in names}
    given = {name: key for name, key in keys.items() if key in state_dict}
    parts = [part for name, key in given.items() for part in _parts(name, state_dict[key], local)]
    write_parts(parts)
    for key in given.values():
        state_dict[key] = torch.empty(0)


__all__ = ["consume_weights", "load_weight", "sharded_weight", "weight_windows"]
