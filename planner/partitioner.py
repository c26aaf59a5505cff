"""TorchRec's partitioner, which places shards that have one on each rank all at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.types import (
    DeviceHardware,
    PartitionByType,
    Perf,
    PlannerError,
    PlannerErrorType,
    ShardingOption,
    Storage,
    Topology,
)

from torchrec_turbossd.planner.space import PERF, STORAGE, facts_of

_UNIFORM = PartitionByType.UNIFORM.value


class UniformFirstPartitioner(GreedyPerfPartitioner):
    """Places as TorchRec's greedy partitioner does, to the last bit.

    It, too, begins with the options that have a shard on every rank, which leave no choice; they are added up here.
    The others it places itself, in what those leave.
    """

    def partition(
        self, proposal: list[ShardingOption], storage_constraint: Topology, hbm_per_device: int | None = None
    ) -> list[ShardingOption]:
        """Set the rank of every shard; returns the proposal.

        Raises:
            PlannerError: a shard fits nowhere.
        """
        uniform = [option for option in proposal if option.partition_by == _UNIFORM]
        if hbm_per_device is not None or not uniform:
            return list(super().partition(proposal, storage_constraint, hbm_per_device))
        left = _without(uniform, storage_constraint)
        ranks = [device.rank for device in left.devices]
        for option in uniform:
            for shard, rank in zip(option.shards, ranks, strict=True):
                shard.rank = rank
        others = [option for option in proposal if option.partition_by != _UNIFORM]
        if others:
            super().partition(others, left)
        return proposal

    @classmethod
    def _cohost_partition(cls, group: Any, hosts: list[list[DeviceHardware]], *args: Any, **kwargs: Any) -> None:
        super()._cohost_partition(group, [_Host(host) for host in hosts], *args, **kwargs)


class _Host(list[DeviceHardware]):
    """A host's devices, which TorchRec copies for each option that stays on a host. What they have left is replaced,
    never changed, so that copies may share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> list[DeviceHardware]:
        return [DeviceHardware(device.rank, device.storage, device.perf) for device in self]


class _Left:
    """A topology, but for what its devices have left, and their load."""

    def __init__(self, topology: Topology, devices: list[DeviceHardware]) -> None:
        self._topology, self.devices = topology, devices

    def __getattr__(self, name: str) -> Any:
        return getattr(self._topology, name)


def _without(uniform: list[ShardingOption], topology: Topology) -> Any:
    devices = topology.devices
    storage = np.array([[getattr(device.storage, name) for name in STORAGE] for device in devices], dtype=np.float64)
    perf = np.array([[getattr(device.perf, name) for name in PERF] for device in devices], dtype=np.float64)
    for option in uniform:
        facts = facts_of(option)
        if len(facts.which) != len(devices):
            raise _no_room(option, f"has {len(facts.which)} shards for {len(devices)} ranks")
        storage -= facts.storage[facts.which]
        perf += facts.perf[facts.which]
        if (storage < 0).any():
            raise _no_room(option, "does not fit on every rank beside the others that have a shard on each")
    return _Left(
        topology,
        [
            DeviceHardware(device.rank, Storage(*room), Perf(*load))
            for device, room, load in zip(devices, storage.tolist(), perf.tolist(), strict=True)
        ],
    )


def _no_room(option: ShardingOption, why: str) -> PlannerError:
    return PlannerError(
        error_type=PlannerErrorType.PARTITION, message=f"{option.sharding_type} of table {option.name!r} {why}"
    )


__all__ = ["UniformFirstPartitioner"]
