"""The fused optimizer of SSD-backed tables as TorchRec sees it: parameters and state are lazy rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.optim.fused import FusedOptimizer

from torchrec_turbossd.sharding.lazy_rows import LazyRows
from torchrec_turbossd.sharding.lazy_sharded import sharded_rows
from torchrec_turbossd.sharding.row_columns import LiveRows, RowColumns
from torchrec_turbossd.tbe.training import TurboSSDTableBatchedEmbeddingBags


class TurboSSDFusedOptimizer(FusedOptimizer):
    """The update itself runs in backward; a changed `lr` reaches it at the next `step` or `zero_grad`.

    Keys are those of TorchRec's FUSED kernel: `<table>.weight`, with state `<table>.momentum1`.

    Args:
        tables: of the TBE, in its order.
        parameter: a table's name and registered parameter. The optimizer is then of this table alone, as TorchRec hangs
            one on each parameter, with the parameter under the key "".
    """

    def __init__(
        self,
        tbe: TurboSSDTableBatchedEmbeddingBags,
        tables: Sequence[ShardedEmbeddingTable],
        group: ProcessGroup | None,
        parameter: tuple[str, Tensor] | None = None,
    ) -> None:
        self._tbe = tbe
        params: dict[str, Tensor | ShardedTensor] = {}
        state: dict[Any, Any] = {}
        for name in dict.fromkeys(table.name for table in tables):
            if parameter is not None and name != parameter[0]:
                continue
            places = [i for i, table in enumerate(tables) if table.name == name]
            if parameter is None:
                weight: Any = _weight(tbe, [(i, tables[i]) for i in places], group)
            else:
                weight = parameter[1]
            params[f"{name}.weight" if parameter is None else ""] = weight
            state[weight] = {
                f"{name}.{spec.name}": _state(tbe, [(i, tables[i]) for i in places], part, group)
                for part, spec in enumerate(tbe.shards[places[0]].table.state, start=1)
            }
        groups = [{"params": list(params.values()), "lr": tbe.get_learning_rate()}]
        super().__init__(params, state, groups)

    def zero_grad(self, set_to_none: bool = False) -> None:
        self._push_learning_rate()

    def step(self, closure: Any = None) -> None:
        self._push_learning_rate()

    def _push_learning_rate(self) -> None:
        self._tbe.set_learning_rate(self.param_groups[0]["lr"])

    def set_optimizer_step(self, step: int) -> None:
        """Set the step count of the fused optimizer."""
        self._tbe.tbe.set_optimizer_step(step)

    def post_load_state_dict(self) -> None:
        self._push_learning_rate()


_Places = Sequence[tuple[int, ShardedEmbeddingTable]]


def _metadata(places: _Places) -> tuple[list[ShardMetadata], Sequence[int]]:
    whole = places[0][1].global_metadata
    return list(whole.shards_metadata), list(whole.size)


def _weight(tbe: TurboSSDTableBatchedEmbeddingBags, places: _Places, group: ProcessGroup | None) -> ShardedTensor:
    shards, size = _metadata(places)
    local = [(table.local_metadata, LazyRows(RowColumns(LiveRows(tbe, i)))) for i, table in places]
    return sharded_rows(local, shards, size, local[0][1].dtype, group)


def _state(
    tbe: TurboSSDTableBatchedEmbeddingBags, places: _Places, part: int, group: ProcessGroup | None
) -> ShardedTensor:
    shards, size = _metadata(places)
    rows = [(table.local_metadata, LazyRows(RowColumns(LiveRows(tbe, i), part))) for i, table in places]
    dtype = rows[0][1].dtype
    if rows[0][1].dim() > 1:
        return sharded_rows(rows, shards, size, dtype, group)
    # A row-wise state is one number a row; column shards lie one after the other, as TorchRec lays them out.
    flat, total = _row_state_layout(shards, int(size[1]))
    local = [(flat[_key(metadata)], held) for metadata, held in rows]
    return sharded_rows(local, list(flat.values()), [total], dtype, group)


def _key(shard: ShardMetadata) -> tuple[Any, ...]:
    # Shards without rows share their offset, so that the rank belongs to it.
    placement: Any = shard.placement
    return (*shard.shard_offsets, placement.rank())


def _row_state_layout(shards: Sequence[ShardMetadata], dim: int) -> tuple[Mapping[tuple[Any, ...], ShardMetadata], int]:
    """1-D metadata of a row-wise state for each weight shard, and the total length."""
    by_column = any(s.shard_sizes[1] != dim for s in shards)
    ordered = sorted(shards, key=lambda s: s.shard_offsets[1]) if by_column else list(shards)
    layout: dict[tuple[Any, ...], ShardMetadata] = {}
    at = 0
    for shard in ordered:
        first = at if by_column else shard.shard_offsets[0]
        rows = shard.shard_sizes[0]
        layout[_key(shard)] = ShardMetadata(shard_offsets=[first], shard_sizes=[rows], placement=shard.placement)
        at += rows
    return layout, at


__all__ = ["TurboSSDFusedOptimizer"]
