"""What the ranks of a model hold, cell by cell, whatever the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from tests.sharding.models import sparse_of
from torchrec_turbossd.tables import TRAINING_TYPES, weight_bytes


@dataclass
class Held:
    """One shard of a table: its place, weights [rows, cols], and each state as [rows, cols] or [rows, 1]."""

    name: str
    row: int
    col: int
    weights: Tensor
    state: list[Tensor]


def held(dmp: DistributedModelParallel) -> list[Held]:
    """The shards of this rank."""
    found = []
    for local in sparse_of(dmp)._local():
        shard = local.shard
        rows, at = local.read(torch.arange(shard.rows)), weight_bytes(shard.cols, shard.table.data_type)
        weights, state = rows[:, :at].contiguous().view(TRAINING_TYPES[shard.table.data_type]), []
        for spec in shard.table.state:
            state.append(rows[:, at : at + spec.row_bytes(shard.cols)].contiguous().view(torch.float32))
            at += spec.row_bytes(shard.cols)
        found.append(Held(shard.table.name, shard.row_offset, shard.col_offset, weights, state))
    return found


@dataclass
class Whole:
    """A table: weights and each state, [rows, dim]; a row-wise state is repeated over the columns of its shard."""

    weights: Tensor
    state: list[Tensor]


def whole(by_rank: list[list[Held]], name: str) -> Whole:
    """A table put together from what all ranks hold; fails where a cell is missing or held twice."""
    shards = [h for shards in by_rank for h in shards if h.name == name]
    rows = max(h.row + h.weights.shape[0] for h in shards)
    cols = max(h.col + h.weights.shape[1] for h in shards)
    seen = torch.zeros(rows, cols)
    found = Whole(torch.empty(rows, cols), [torch.empty(rows, cols) for _ in shards[0].state])
    for h in shards:
        place = slice(h.row, h.row + h.weights.shape[0]), slice(h.col, h.col + h.weights.shape[1])
        seen[place] += 1
        found.weights[place] = h.weights.float()
        for target, values in zip(found.state, h.state, strict=True):
            target[place] = values.expand(h.weights.shape)
    assert bool((seen == 1).all()), f"{name}: a cell is held by no rank or by several"
    return found


def check_loaded(saved: list[list[Held]], loaded: list[list[Held]], names: Any) -> None:
    """Every loaded weight and element state is the saved one; a row-wise state is the mean of the saved ones."""
    for name in names:
        wanted, got = whole(saved, name), whole(loaded, name)
        assert torch.equal(wanted.weights, got.weights), f"{name}: weights"
        ranges = {(h.col, h.weights.shape[1]) for shards in saved for h in shards if h.name == name}
        for h in (h for shards in loaded for h in shards if h.name == name):
            rows, cols = slice(h.row, h.row + h.weights.shape[0]), slice(h.col, h.col + h.weights.shape[1])
            for place, values in enumerate(h.state):
                there = wanted.state[place][rows, cols]
                if values.shape == there.shape:
                    assert torch.equal(values, there), f"{name}: state {place}"
                elif (h.col, h.weights.shape[1]) in ranges:
                    assert torch.equal(values, there[:, :1]), f"{name}: state {place} of unchanged columns"
                else:
                    mean = there.double().mean(1, keepdim=True)
                    torch.testing.assert_close(values.double(), mean, rtol=1e-7, atol=0.0)


__all__ = ["Held", "Whole", "check_loaded", "held", "whole"]
