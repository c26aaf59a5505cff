"""What sharders of modules with tables on SSD share: their options, and the kernels they offer."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from torchrec.distributed.types import ParameterSharding

from torchrec_turbossd.cache import DEFAULT_POLICY
from torchrec_turbossd.errors import BudgetError, ConfigError
from torchrec_turbossd.planner.kernel import KEY_VALUE, TURBO_SSD
from torchrec_turbossd.sharding.kernel import KernelOptions
from torchrec_turbossd.sharding.module import TurboSSDOptions
from torchrec_turbossd.sharding.rank_store import StoreOptions


class TurboSSDSharder:
    """Comes before one of TorchRec's sharders.

    Args:
        ssd_directory: base directory of the live rows, on a local SSD. Each rank and module takes a sub-directory of
            its own, which is emptied when it is opened: what is to be kept is saved as a snapshot. A table's
            `KeyValueParams.ssd_storage_directory` comes before it; `@local_rank` in either becomes the local rank.
        fused_params: as for TorchRec's sharder; `optimizer` is EXACT_SGD (also when none is given),
            EXACT_ROWWISE_ADAGRAD or EXACT_ADAGRAD for tables on SSD, on CUDA also ADAM, PARTIAL_ROWWISE_ADAM, LAMB,
            PARTIAL_ROWWISE_LAMB or LARS_SGD.
        stock: keyword arguments of TorchRec's sharder.
        load_factor: share of a shard's rows that get slots when the plan says nothing.
        seed: of rows never written. policy: an eviction policy by name. read_threads: for each store;
            None: a rank's share of the machine's cores, 2 to 8.
        dram_budget_gb: on a GPU, GiB of host memory of a rank for rows without a slot, of all tables whose
            `KeyValueParams.l2_cache_size` says nothing, where they save most. The planner gives as much of it as there
            is DRAM; None: what it finds free. A plan that says nothing has it split in each module by itself, and
            none where this is None. Of no meaning on a CPU machine.
    """

    _OURS: tuple[str, ...]
    """How tables on SSD can be sharded."""

    _STOCK: tuple[str, ...] = ()
    """Options of TorchRec's sharder."""

    def __init__(
        self,
        ssd_directory: str | os.PathLike[str] | None = None,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: Any = None,
        *,
        load_factor: float = 0.2,
        seed: int = 0,
        policy: str = DEFAULT_POLICY,
        read_threads: int | None = None,
        dram_budget_gb: float | None = None,
        **stock: Any,
    ) -> None:
        unknown = sorted(set(stock) - set(self._STOCK))
        if unknown:
            options = ["dram_budget_gb", "load_factor", "policy", "read_threads", "seed", *self._STOCK]
            raise ConfigError(f"{type(self).__name__} has no options {', '.join(unknown)}; it has {', '.join(options)}")
        super().__init__(  # type: ignore[call-arg]
            fused_params=fused_params, qcomm_codecs_registry=qcomm_codecs_registry, **stock
        )
        if not 0.0 < load_factor <= 1.0:
            raise ConfigError(f"load_factor must be in (0, 1], got {load_factor}")
        if dram_budget_gb is not None and not (math.isfinite(dram_budget_gb) and dram_budget_gb >= 0):
            raise BudgetError(f"dram_budget_gb must be finite GiB, 0 or more, or None, got {dram_budget_gb}")
        self._turbo_options = TurboSSDOptions(
            store=StoreOptions(ssd_directory=ssd_directory, read_threads=read_threads),
            kernel=KernelOptions(seed=seed, policy=policy),
            load_factor=load_factor,
            dram_budget_gb=dram_budget_gb,
        )

    @property
    def dram_budget_gb(self) -> float | None:
        """GiB of a rank for the DRAM tier, as it was given."""
        return self._turbo_options.dram_budget_gb

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """What tables on SSD can have, and what TorchRec offers on this device."""
        stock: list[str] = super().sharding_types(compute_device_type)  # type: ignore[misc]
        return list(dict.fromkeys([*self._OURS, *stock]))

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """TorchRec's resident kernels, and ours for the sharding types that it supports."""
        stock: list[str] = super().compute_kernels(sharding_type, compute_device_type)  # type: ignore[misc]
        # UVM kernels would park tables in host memory before the planner ever tried SSD.
        resident = [kernel for kernel in stock if "uvm" not in kernel and not kernel.startswith("key_value")]
        return [*resident, TURBO_SSD] if sharding_type in self._OURS else resident


def on_turbo_ssd(params: dict[str, ParameterSharding]) -> dict[str, ParameterSharding]:
    """A module's plan with our kernel where it says KEY_VALUE; the plan itself is not changed."""
    return {
        name: dataclasses.replace(sharding, compute_kernel=TURBO_SSD)
        if sharding.compute_kernel == KEY_VALUE
        else sharding
        for name, sharding in params.items()
    }


__all__ = ["TurboSSDSharder", "on_turbo_ssd"]
