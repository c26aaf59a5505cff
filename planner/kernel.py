"""The kernel name of tables on SSD, and what travels in a plan beside it: slots of each shard.

The name is TorchRec's own extension point, so that nothing of TorchRec is patched and its plans stay valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import CacheParams, ModuleSharder, ParameterSharding

from torchrec_turbossd.errors import ConfigError, UnsupportedError

TURBO_SSD: str = EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value
"""Name for `ParameterConstraints(compute_kernels=[...])` and `ParameterSharding.compute_kernel`."""

KEY_VALUE: str = EmbeddingComputeKernel.KEY_VALUE.value
"""TorchRec's own name for tables on SSD, understood as `TURBO_SSD`."""

PLAN_VERSION = 1
HBM_DEVICES = ("cuda", "mtia")
_OF_SHARDS = ("slots", "row_bytes", "hit_rates", "dram_slots", "dram_hit_rates")


@dataclass
class TurboCacheParams(CacheParams):
    """TorchRec's cache parameters of one table, with sizes for each of its shards.

    The tuples are parallel to `sharding_spec.shards`. Pickles, deep-copies and compares by value; the hash is kept
    until a field changes, and never pickled, since another process hashes otherwise.

    Attributes:
        slots: usable slots of each shard, at most its rows (slot 0 comes on top).
        row_bytes: weights and optimizer state of one row of each shard; may be left out.
        hit_rates: predicted share of lookups whose row is in a slot, per lookup, of each shard; may be left out.
        fixed: the user's `load_factor` set the slots, so that no leftover memory is added.
        version: layout of these fields.
        dram_slots: rows of each shard that the DRAM tier of a GPU keeps besides its slots, 0 for none; left out where
            the plan does not say.
        dram_hit_rates: predicted share of lookups whose row is in that tier, of each shard; left out likewise.

    Raises:
        ConfigError: tuples that are given differ in length.
    """

    slots: tuple[int, ...] = ()
    row_bytes: tuple[int, ...] = ()
    hit_rates: tuple[float, ...] = ()
    fixed: bool = False
    version: int = PLAN_VERSION
    dram_slots: tuple[int, ...] = ()
    dram_hit_rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in _OF_SHARDS[1:]:
            values = getattr(self, name)
            if values and len(values) != len(self.slots):
                raise ConfigError(
                    f"{name} needs one entry for each shard as slots has, got {len(values)} and {len(self.slots)}"
                )

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.pop("_hash", None)
        super().__setattr__(name, value)

    def __hash__(self) -> int:
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = self.__dict__["_hash"] = hash((CacheParams.__hash__(self), self._ours()))
        return known

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    def stable_fingerprint(self) -> tuple[object, ...]:
        """What TorchRec 1.9.2 and later keys its plan cache by."""
        # Earlier versions have no such method to extend.
        stock = getattr(super(), "stable_fingerprint", None)
        base = stock() if stock else ("cache_params", 0, str(self.algorithm), self.load_factor)
        return (*base, "turbo_ssd", *self._ours())

    def _ours(self) -> tuple[object, ...]:
        return (self.version, self.fixed, *(getattr(self, name) for name in _OF_SHARDS))

    def of_shards(self, numbers: Sequence[int]) -> TurboCacheParams:
        """The same for these shards, in this order."""
        known = {name: values for name in _OF_SHARDS if (values := getattr(self, name))}
        kept: dict[str, Any] = {name: tuple(values[n] for n in numbers) for name, values in known.items()}
        return replace(self, **kept)


def slots_of(sharding: ParameterSharding) -> tuple[int, ...] | None:
    """Slots of each shard of a planned table, parallel to its shards; None where the plan carries none.

    Raises:
        UnsupportedError: a newer release made the plan.
    """
    params = _planned(sharding)
    return params.slots if params is not None else None


def dram_slots_of(sharding: ParameterSharding) -> tuple[int, ...] | None:
    """Rows of each shard of a planned table that the DRAM tier of a GPU keeps; None where the plan does not say.

    Raises:
        UnsupportedError: as `slots_of`.
    """
    params = _planned(sharding)
    return (params.dram_slots or None) if params is not None else None


def _planned(sharding: ParameterSharding) -> TurboCacheParams | None:
    params = sharding.cache_params
    if not isinstance(params, TurboCacheParams) or not params.slots:
        return None
    if params.version > PLAN_VERSION:
        raise UnsupportedError(
            f"the plan has layout version {params.version}, this release reads up to {PLAN_VERSION}: upgrade, or plan "
            "again"
        )
    return params


def offered_on_ssd(sharder: ModuleSharder[nn.Module], compute_device: str) -> list[str]:
    """The sharding types in which a sharder can put tables on SSD."""
    kinds = sharder.sharding_types(compute_device)
    return [kind for kind in kinds if TURBO_SSD in sharder.compute_kernels(kind, compute_device)]


def fast_memory(compute_device: str) -> str:
    """Which field of TorchRec's `Storage` holds the slots: "hbm" on an accelerator, "ddr" on a CPU machine."""
    return "hbm" if compute_device in HBM_DEVICES else "ddr"


__all__ = [
    "KEY_VALUE",
    "PLAN_VERSION",
    "TURBO_SSD",
    "TurboCacheParams",
    "dram_slots_of",
    "fast_memory",
    "offered_on_ssd",
    "slots_of",
]
