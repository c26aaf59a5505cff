"""Options that are cheap to estimate, hash and copy: shards of one size have one estimate."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torchrec.distributed.planner.types import Perf, Shard, ShardingOption, Storage

from torchrec_turbossd.planner.kernel import TurboCacheParams

Estimate = Callable[[list[ShardingOption]], None]
STORAGE = tuple(field.name for field in dataclasses.fields(Storage))
PERF = tuple(field.name for field in dataclasses.fields(Perf))


@dataclass(frozen=True, eq=False)
class Facts:
    """What the shards of an option need, as arrays; never changed, and so shared by copies.

    Attributes:
        which: [shards] int64, the row of a shard in `storage` and `perf`.
        storage: [kinds of shards, 3] float64 bytes, in the order of `STORAGE`.
        perf: [kinds of shards, fields] float64 ms, in the order of `PERF`.
        times: [kinds of shards] float64 ms, all that counts of a shard's time.
        digest: a hash of all these.
    """

    which: npt.NDArray[np.int64]
    storage: npt.NDArray[np.float64]
    perf: npt.NDArray[np.float64]
    times: npt.NDArray[np.float64]
    digest: int

    @classmethod
    def of(cls, shards: list[Shard]) -> Facts:
        """Raises AttributeError for shards without estimates."""
        kinds: dict[tuple[int, int], tuple[int, Storage, Perf]] = {}
        which = []
        for shard in shards:
            key = id(shard.storage), id(shard.perf)
            known = kinds.get(key)
            if known is None:
                known = kinds[key] = (len(kinds), shard.storage, shard.perf)
            which.append(known[0])
        storage = [[getattr(each, name) for name in STORAGE] for _, each, _ in kinds.values()]
        perf = [[getattr(each, name) for name in PERF] for _, _, each in kinds.values()]
        times = [each.total for _, _, each in kinds.values()]
        return cls(
            np.array(which),
            np.array(storage, dtype=np.float64),
            np.array(perf, dtype=np.float64),
            np.array(times, dtype=np.float64),
            hash((tuple(which), tuple(map(tuple, storage)), tuple(map(tuple, perf)))),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Facts:
        return self


class Shards(list[Shard]):
    """Shards whose copies share what they share, as `copy.deepcopy` has it, in a tenth of its time."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Shards:
        twins = Shards()
        memo[id(self)] = twins
        for shard in self:
            twin = object.__new__(type(shard))
            twin.__dict__.update(shard.__dict__, size=list(shard.size), offset=list(shard.offset))
            for name in ("storage", "perf"):
                value = getattr(shard, name)
                known = memo.get(id(value))
                setattr(twin, name, copy.deepcopy(value, memo) if known is None else known)
            twins.append(twin)
        return twins


class PlannedOption(ShardingOption):
    """An option that knows its hash and its facts until it is estimated anew.

    TorchRec tells proposals apart by the hashes of their options, for which it goes through all shards every time. The
    hash is that of the last estimates: ranks do not count, and in TorchRec's use there are none.
    """

    @classmethod
    def of(cls, option: ShardingOption) -> PlannedOption:
        """`option` itself, with all that it refers to, as one of this class."""
        twin = cls.__new__(cls)
        twin.__dict__.update(option.__dict__)
        return twin

    @property
    def facts(self) -> Facts:
        """Of the estimates."""
        return facts_of(self)

    def __hash__(self) -> int:
        return hash((self.fqn, self.sharding_type, self.compute_kernel, self.cache_params, self.facts.digest))


def facts_of(option: ShardingOption) -> Facts:
    """The facts of any option; kept by those of this planner until `forget_facts`."""
    known: Facts | None = option.__dict__.get("_facts")
    if known is None:
        known = Facts.of(option.shards)
        if isinstance(option, PlannedOption):
            option.__dict__["_facts"] = known
    return known


def forget_facts(option: ShardingOption) -> None:
    """For whoever changes estimates of shards."""
    option.__dict__.pop("_facts", None)


def estimate_by_size(options: list[ShardingOption], estimate: Estimate) -> None:
    """Let `estimate` see one shard of each size of an option, and give its answer to all shards of this size.

    A shard's estimates follow from its size; cache parameters, which have an entry for each shard, get all of them.
    """
    every = [option.shards for option in options]
    for option, shards in zip(options, every, strict=True):
        forget_facts(option)
        option.shards = list({tuple(shard.size): shard for shard in reversed(shards)}.values())
    try:
        estimate(options)
        seen = [option.shards for option in options]
    finally:
        for option, shards in zip(options, every, strict=True):
            option.shards = Shards(shards)
    for option, estimated in zip(options, seen, strict=True):
        _spread(option, estimated)


def _spread(option: ShardingOption, estimated: list[Shard]) -> None:
    numbers = {tuple(shard.size): n for n, shard in enumerate(estimated)}
    which = [numbers[tuple(shard.size)] for shard in option.shards]
    for shard, n in zip(option.shards, which, strict=True):
        shard.storage, shard.perf = estimated[n].storage, estimated[n].perf
    params = option.cache_params
    if isinstance(params, TurboCacheParams) and len(params.slots) == len(estimated):
        option.cache_params = params.of_shards(which)


__all__ = ["PERF", "STORAGE", "Facts", "PlannedOption", "Shards", "estimate_by_size", "facts_of", "forget_facts"]
