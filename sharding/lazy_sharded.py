"""A ShardedTensor of lazy rows, which `torch.distributed.checkpoint` saves and loads window by window."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.metadata import TensorProperties as SavedProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from torchrec_turbossd.errors import InputError
from torchrec_turbossd.sharding.lazy_rows import LazyRows
from torchrec_turbossd.sharding.windows import windows


class LazyShardedTensor(ShardedTensor):
    """Made by `sharded_rows`; its local shards are `LazyRows`.

    Saving makes an item of each window, so that one window is in memory at a time. Loading offers whole shards, into
    which whatever was saved is written through: were it windows, a large shard of another kernel would be read from
    the file once for each of them. Copied or pickled it becomes an ordinary ShardedTensor of plain tensors.
    """

    _saving = False

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        """`torch.distributed.checkpoint`'s hook: what this rank saves."""
        self._saving = True
        properties = self.metadata().tensor_properties
        saved = SavedProperties(
            dtype=properties.dtype,
            layout=properties.layout,
            requires_grad=properties.requires_grad,
            memory_format=properties.memory_format,
            pin_memory=properties.pin_memory,
        )
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=saved, size=self.metadata().size),
            )
            for shard in self.local_shards()
            for chunk in _chunks(shard)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """The hook that says what this rank loads."""
        self._saving = False
        return [
            ChunkStorageMetadata(
                offsets=torch.Size(shard.metadata.shard_offsets), sizes=torch.Size(shard.metadata.shard_sizes)
            )
            for shard in self.local_shards()
            if shard.tensor.numel()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The hook that gives a window to save, in memory, or a shard to load into, lazily."""
        for shard in self.local_shards():
            rows, (first, *others) = _rows_of(shard), shard.metadata.shard_offsets
            row = index.offset[0] - first if index.offset is not None and list(index.offset[1:]) == others else -1
            if self._saving and 0 <= row < len(rows):
                return rows.window(row, rows.window_rows).materialise()
            if row == 0 and len(rows):
                return rows
        raise InputError(f"{index.fqn}: no shard at {index.offset} on this rank")

    def load_state_dict(self, value: Any) -> None:
        """Overwrite the local shards with `value`; TorchRec's optimizers load their state by this.

        Args:
            value: a ShardedTensor with the same shards, or the whole tensor.

        Raises:
            InputError: a value of another kind, shape or sharding; then nothing was written.
        """
        shards = self.local_shards()
        held = [(shard.metadata, _rows_of(shard)) for shard in shards]
        name = held[0][1]._columns.name if held else "rows"
        write_parts(matching_parts(name, value, self.metadata().size, held))

    def with_rows(self, change: Callable[[LazyRows], LazyRows]) -> LazyShardedTensor:
        """The same tensor with other rows in its local shards."""
        local = [Shard(change(_rows_of(shard)), shard.metadata) for shard in self.local_shards()]
        return _lazy(local, self.metadata(), self._process_group)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = [Shard(shard.tensor.clone(), shard.metadata) for shard in self.local_shards()]
        return _sharded(plain, self.metadata(), self._process_group).__reduce_ex__(protocol)


def _rows_of(shard: Shard) -> LazyRows:
    if not isinstance(shard.tensor, LazyRows):
        raise InputError(f"the shard at {shard.metadata.shard_offsets} holds a {type(shard.tensor).__name__}")
    return shard.tensor


def _chunks(shard: Shard) -> list[ChunkStorageMetadata]:
    rows = _rows_of(shard)
    first, *others = shard.metadata.shard_offsets
    return [
        ChunkStorageMetadata(
            offsets=torch.Size([first + at, *others]), sizes=torch.Size([count, *shard.metadata.shard_sizes[1:]])
        )
        for at, count in windows(rows.shape[0], rows.window_rows)
    ]


def matching_parts(
    what: str, value: Any, size: Sequence[int], held: Iterable[tuple[ShardMetadata, LazyRows]]
) -> list[tuple[LazyRows, Tensor]]:
    """For each local shard of a tensor of `size`, the part of `value` that belongs there; see `load_state_dict`."""
    whole = tuple(size)
    plain = isinstance(value, Tensor) and not isinstance(value, (DTensor, ShardedTensor))
    if not (plain or isinstance(value, ShardedTensor)):
        raise InputError(f"{what} are loaded from a ShardedTensor or a {whole} tensor, got {type(value).__name__}")
    if tuple(value.size()) != whole:
        raise InputError(f"{what} have the shape {whole}, got {tuple(value.size())}")
    if plain and value.device.type == "meta":
        raise InputError(f"{what}: got a tensor on the meta device, which has no values")
    return [(rows, _of_whole(value, shard) if plain else _of_shards(what, value, shard)) for shard, rows in held]


def _of_whole(value: Tensor, shard: ShardMetadata) -> Tensor:
    for dim, (first, count) in enumerate(zip(shard.shard_offsets, shard.shard_sizes, strict=True)):
        value = value.narrow(dim, first, count)
    return value


def _of_shards(what: str, value: ShardedTensor, shard: ShardMetadata) -> Tensor:
    for held in value.local_shards():
        if _place(held.metadata) == _place(shard) and tuple(held.tensor.shape) == tuple(shard.shard_sizes):
            return held.tensor
    raise InputError(
        f"{what}: the loaded ShardedTensor has no shard at {list(shard.shard_offsets)} of {list(shard.shard_sizes)} on "
        "this rank; load it under the same plan, give the whole tensor, or load with torch.distributed.checkpoint"
    )


def _place(shard: ShardMetadata) -> tuple[list[int], list[int]]:
    return list(shard.shard_offsets), list(shard.shard_sizes)


def write_parts(parts: Iterable[tuple[LazyRows, Tensor]]) -> None:
    """Write what `matching_parts` found."""
    for rows, part in parts:
        rows.copy_(part)


def sharded_rows(
    local: Sequence[tuple[ShardMetadata, LazyRows]],
    shards: Sequence[ShardMetadata],
    size: Sequence[int],
    dtype: torch.dtype,
    group: ProcessGroup | None,
) -> LazyShardedTensor:
    """A ShardedTensor over lazy rows.

    Args:
        local: this rank's (metadata, rows).
        shards: metadata of all shards; placements are taken to the CPU, where the rows are.
        size: of the whole tensor.
    """
    everywhere = [_on_cpu(shard) for shard in shards]
    held = [Shard(rows, _on_cpu(mine)) for mine, rows in local]
    metadata = ShardedTensorMetadata(everywhere, torch.Size(size), TensorProperties(dtype=dtype))
    return _lazy(held, metadata, group)


def _lazy(local: list[Shard], metadata: ShardedTensorMetadata, group: ProcessGroup | None) -> LazyShardedTensor:
    made = _sharded(local, metadata, group)
    # TorchRec and DCP ask for a ShardedTensor, whose constructors make no subclass.
    made.__class__ = LazyShardedTensor
    return made  # type: ignore[return-value]


def _sharded(local: list[Shard], metadata: ShardedTensorMetadata, group: ProcessGroup | None) -> ShardedTensor:
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, metadata, process_group=group)


def _on_cpu(shard: ShardMetadata) -> ShardMetadata:
    copied = copy.deepcopy(shard)
    if copied.placement is not None:
        copied.placement._device = torch.device("cpu")
    return copied


__all__ = ["LazyShardedTensor", "matching_parts", "sharded_rows", "write_parts"]
