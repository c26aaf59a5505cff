"""Rows from any rank to the shards that own them: the collective behind `streaming_update`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard.sharding_spec import ShardMetadata

from torchrec_turbossd.errors import InputError, RowIndexError
from torchrec_turbossd.rows import last_of_each
from torchrec_turbossd.sharding.local_tables import LocalTable
from torchrec_turbossd.tables import TRAINING_TYPES, TableSpec, weight_bytes


@dataclass(frozen=True, kw_only=True)
class RowUpdate:
    """New rows of one table from one rank.

    ids: [N] int64 global. weights: [N, dim] floating. state: optimizer state by name ([N] for each row or [N, dim]),
    complete or empty; empty keeps what the rows have.
    """

    table: TableSpec
    ids: Tensor
    weights: Tensor
    state: Mapping[str, Tensor]

    def parts(self, shards: Sequence[ShardMetadata]) -> list[tuple[Tensor, Tensor]]:
        """For each shard: (ids [M] int64, values [M, columns and state] float32), on the CPU.

        Raises `InputError` or `RowIndexError` when the update cannot be applied.
        """
        self._check()
        ids = self.ids.detach().to(device="cpu", dtype=torch.int64)
        weights = self.weights.detach().cpu()
        state = {name: value.detach().cpu() for name, value in self.state.items()}
        return [self._columns(shard, ids, weights, state) for shard in shards]

    def _check(self) -> None:
        name, table = self.table.name, self.table
        if self.ids.dim() != 1 or self.ids.dtype not in (torch.int32, torch.int64):
            raise InputError(f"table {name!r}: ids must be 1-D int32 or int64, got {self.ids.dim()}-D {self.ids.dtype}")
        count = self.ids.numel()
        self._check_part("weights", self.weights, (count, table.dim))
        if self.state and set(self.state) != {s.name for s in table.state}:
            raise InputError(
                f"table {name!r}: optimizer state must be all of {[s.name for s in table.state]} or nothing, got "
                f"{sorted(self.state)}"
            )
        for spec in table.state if self.state else ():
            self._check_part(spec.name, self.state[spec.name], (count,) if spec.per_row else (count, table.dim))
        if count and (int(self.ids.min()) < 0 or int(self.ids.max()) >= table.rows):
            bad = int(self.ids.min()) if int(self.ids.min()) < 0 else int(self.ids.max())
            raise RowIndexError(f"table {name!r} has rows 0 to {table.rows - 1}, got id {bad}")

    def _check_part(self, what: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(value.shape) != shape or not value.is_floating_point():
            raise InputError(
                f"table {self.table.name!r}: {what} must be floating {shape}, got {value.dtype} {tuple(value.shape)}"
            )
        kept = value.to(TRAINING_TYPES[self.table.data_type]) if what == "weights" else value
        if not bool(torch.isfinite(kept).all()):
            raise InputError(
                f"table {self.table.name!r}: {what} must be finite as {self.table.data_type}, got NaN, infinity or too "
                "large numbers"
            )

    def _columns(
        self, shard: ShardMetadata, ids: Tensor, weights: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        (row, col), (rows, cols) = shard.shard_offsets, shard.shard_sizes
        here = (ids >= row) & (ids < row + rows)
        columns = [weights[here, col : col + cols]]
        for spec in self.table.state if state else ():
            value = state[spec.name][here]
            columns.append(value.unsqueeze(1) if spec.per_row else value[:, col : col + cols])
        return ids[here], torch.cat([c.to(torch.float32) for c in columns], dim=1)


def route(
    parts: Sequence[tuple[Tensor, Tensor]] | None,
    with_state: bool,
    state_widths: Sequence[int],
    shards: Sequence[ShardMetadata],
    group: ProcessGroup | None,
    device: torch.device,
) -> dict[int, tuple[Tensor, Tensor, bool]]:
    """Send rows to the ranks of their shards. Collective: every rank of `group` calls it for the same table.

    Args:
        parts: this rank's rows, by shard; None says that they were refused, and then every rank raises.
        with_state: whether they carry optimizer state.
        state_widths: state columns of a row of each shard, when state comes along.
        shards: all shards of the table.
        device: where collectives of `group` work.

    Returns:
        For each shard (by place in `shards`) of this rank: (ids, values, whether values carry state), last wins.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    owners = [_rank_of(shard) for shard in shards]
    head = [int(parts is not None), int(with_state)]
    counts = [ids.numel() for ids, _ in parts] if parts is not None else [0] * len(shards)
    table = torch.tensor(head + counts, dtype=torch.int64, device=device)
    everyone = [torch.empty_like(table) for _ in range(world)]
    dist.all_gather(everyone, table, group=group)
    heads = torch.stack(everyone).tolist()
    _agree(heads)
    parts = parts or []
    with_state = any(h[1] for h in heads if sum(h[2:]))
    mine = [place for place, owner in enumerate(owners) if owner == rank]
    order = sorted(range(len(shards)), key=lambda place: owners[place])
    width = [s.shard_sizes[1] + (extra if with_state else 0) for s, extra in zip(shards, state_widths, strict=True)]
    send = [sum(counts[p] for p in order if owners[p] == to) for to in range(world)]
    send_values = [sum(counts[p] * width[p] for p in order if owners[p] == to) for to in range(world)]
    receive = [sum(heads[source][2 + p] for p in mine) for source in range(world)]
    receive_values = [sum(heads[source][2 + p] * width[p] for p in mine) for source in range(world)]
    ids = _exchange([parts[p][0] for p in order], (send, receive), (torch.int64, device), group)
    values = _exchange(
        [parts[p][1].flatten() for p in order], (send_values, receive_values), (torch.float32, device), group
    )
    return _sort_out(ids, values, heads, {p: width[p] for p in mine}, with_state)


def _rank_of(shard: ShardMetadata) -> int:
    placement: Any = shard.placement
    return int(placement.rank())


def _agree(heads: list[list[int]]) -> None:
    refused = [rank for rank, head in enumerate(heads) if not head[0]]
    if refused:
        raise InputError(f"the rows of rank {', '.join(map(str, refused))} were refused there; nothing was changed")
    giving = {rank: head[1] for rank, head in enumerate(heads) if sum(head[2:])}
    stateless = [rank for rank, with_state in giving.items() if not with_state]
    if stateless and any(giving.values()):
        raise InputError(
            f"some ranks gave optimizer state, but rank {', '.join(map(str, stateless))} did not; nothing was changed"
        )


def _exchange(
    parts: list[Tensor],
    splits: tuple[list[int], list[int]],
    kind: tuple[torch.dtype, torch.device],
    group: ProcessGroup | None,
) -> Tensor:
    dtype, device = kind
    sent = torch.cat([p.to(dtype=dtype, device=device) for p in parts])
    received = torch.empty(sum(splits[1]), dtype=dtype, device=device)
    dist.all_to_all_single(received, sent, splits[1], splits[0], group=group)
    return received.cpu()


def _sort_out(
    ids: Tensor, values: Tensor, heads: list[list[int]], widths: dict[int, int], with_state: bool
) -> dict[int, tuple[Tensor, Tensor, bool]]:
    """Split what came, by source rank and shard, into one batch a shard; later ranks win, later rows within one."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {place: [] for place in widths}
    at = at_value = 0
    for head in heads:
        for place, width in widths.items():
            count = head[2 + place]
            part = values[at_value : at_value + count * width].view(count, width)
            found[place].append((ids[at : at + count], part))
            at, at_value = at + count, at_value + count * width
    result = {}
    for place, parts in found.items():
        together = torch.cat([i for i, _ in parts])
        distinct, last = last_of_each(together)
        result[place] = (distinct, torch.cat([v for _, v in parts])[last], with_state)
    return result


def apply(local: LocalTable, ids: Tensor, values: Tensor, with_state: bool) -> None:
    """Write routed rows (`ids` global, distinct) into a local shard; state is kept unless it came along."""
    shard = local.shard
    size = weight_bytes(shard.cols, shard.table.data_type)
    at = ids - shard.row_offset
    weights = values[:, : shard.cols].to(TRAINING_TYPES[shard.table.data_type]).contiguous().view(torch.uint8)
    if with_state and shard.table.state:
        rows = torch.cat([weights, values[:, shard.cols :].contiguous().view(torch.uint8)], dim=1)
    elif shard.table.state:
        rows = torch.cat([weights, local.read(at)[:, size:]], dim=1)
    else:
        rows = weights
    local.write(at, rows)


__all__ = ["RowUpdate", "apply", "route"]
