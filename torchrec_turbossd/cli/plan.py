"""From what is to be planned to a plan with everything that is predicted of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption
from torchrec.distributed.types import CacheParams, ShardingPlan

from torchrec_turbossd.cli.describe import Made, describe
from torchrec_turbossd.cli.hardware import Reserve, make_machine, make_topology
from torchrec_turbossd.cli.model import Config, build_model, configs_of
from torchrec_turbossd.cli.profiles import load_profiles
from torchrec_turbossd.cli.report import PlanReport
from torchrec_turbossd.cli.spec import Limits, PlanSpec, TableEntry
from torchrec_turbossd.errors import BudgetError, ConfigError
from torchrec_turbossd.planner import TURBO_SSD, Machine, turbo_ssd_planner
from torchrec_turbossd.planner.access import Access
from torchrec_turbossd.planner.demand import Demand
from torchrec_turbossd.planner.kernel import KEY_VALUE
from torchrec_turbossd.planner.planner import TurboSSDPlanner
from torchrec_turbossd.sharding import get_turbo_ssd_sharders
from torchrec_turbossd.tbe.training_options import row_state

_IN_OUR_WORDS = (
    ("Topology(hbm_cap=..., ddr_cap=...)", "hbm and dram (--hbm, --dram)"),
    ("Topology(hbm_cap=...)", "hbm (--hbm)"),
    ("Topology(ddr_cap=...)", "dram (--dram)"),
    ("Topology(ssd_cap=...)", "ssd (--ssd)"),
    (f"allow {TURBO_SSD!r} in", f"allow {KEY_VALUE!r} in"),
    ("pooling_factors", "lookups"),
    ("add ranks", "add ranks (--ranks)"),
)
"""The planner's, and those of files and options."""

_NO_OPTION = re.compile(r"No available sharding type.* for (.+?)\. Module", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What `make_plan` returns.

    Attributes:
        report: everything that is predicted.
        plan: TorchRec's plan, for `DistributedModelParallel`.
        model: the model that was planned.
        access: hit-rate curves of its tables.
        options: what the planner chose for each table.
    """

    report: PlanReport
    plan: ShardingPlan
    model: nn.Module
    access: Access
    options: list[ShardingOption]


def make_plan(
    spec: PlanSpec, model: nn.Module | None = None, *, machine: Machine | None = None, where: str = "the plan"
) -> Planned:
    """Plan the tables of `spec`, or those of `model`, to which `spec` may add.

    Args:
        spec: what is to be planned.
        model: a model, which may be on the meta device.
        machine: as measured; what `spec.hardware` says overrides it.
        where: the file, to name in errors.

    Raises:
        BudgetError: nothing fits; says what is short, by how much, and what would do.
        ConfigError: something is missing, or does not go together.
    """
    if spec.batch_size is None:
        raise ConfigError(f"{where}: batch_size missing; the file or --batch-size says it")
    machine = make_machine(spec.hardware, machine, where)
    topology, ssd = make_topology(machine, spec.hardware)
    made_here, model = model is None, build_model(spec.tables) if model is None else model
    configs = configs_of(model)
    entries = _by_name(spec, configs)
    constraints = {name: _constraints(entry, configs[name]) for name, entry in entries.items()}
    rows = {name: int(config.num_embeddings) for name, config in configs.items()}
    profiles = load_profiles({name: entry.access for name, entry in entries.items() if entry.access}, rows)
    sharders = get_turbo_ssd_sharders(fused_params={"optimizer": spec.optimizer})
    reserve, chosen = Reserve(spec.reserve), _Kept()
    planner = turbo_ssd_planner(
        topology,
        spec.batch_size,
        constraints,
        access=profiles,
        batches_in_flight=spec.batches_in_flight,
        storage_reservation=reserve,
        ssd=ssd,
        callbacks=[chosen],
        stats=[],
    )
    plan = _plan(planner, model, sharders, entries)
    order = {name: number for number, name in enumerate(entries if made_here else configs)}
    options = sorted(chosen.options, key=lambda option: order.get(option.name, len(order)))
    made = Made(
        plan=plan,
        options=options,
        model=model,
        sharders=sharders,
        topology=topology,
        ssd=ssd,
        notes=machine.notes,
        free=reserve.last_reserved_topology or topology,
        demand=Demand(
            world_size=topology.world_size, batches_in_flight=spec.batches_in_flight, constraints=constraints
        ),
        access=Access(profiles),
    )
    report = describe(spec, made, configs, entries)
    if report.hit_rate_on_ssd is not None:
        # Else nobody could train what was planned.
        row_state(spec.optimizer, torch.device(topology.compute_device))
    return Planned(report=report, plan=plan, model=model, access=made.access, options=options)


def _plan(
    planner: TurboSSDPlanner, model: nn.Module, sharders: list[Any], entries: Mapping[str, TableEntry]
) -> ShardingPlan:
    """A plan; what stands in its way is said in the words of files and options."""
    try:
        return planner.plan(model, sharders)
    except BudgetError as error:
        text = str(error)
        for theirs, ours in _IN_OUR_WORDS:
            text = text.replace(theirs, ours)
        raise BudgetError(text) from error
    except ConfigError as error:
        found = _NO_OPTION.match(str(error))
        entry = entries.get(found.group(1)) if found is not None else None
        if entry is None:
            raise
        raise ConfigError(
            f"{entry.where}: no way to hold {entry.name!r} goes with its constraints, its kind and this device; ask "
            f"for fewer compute_kernels or sharding_types ({_limits(entry.limits)}). Tables on SSD cannot be "
            "data_parallel, sequences not table_row_wise"
        ) from error


def _limits(limits: Limits) -> str:
    said = {"compute_kernels": limits.compute_kernels, "sharding_types": limits.sharding_types}
    return "; ".join(f"{name}: {', '.join(names)}" for name, names in said.items() if names) or "none are said"


class _Kept:
    """A callback of the planner that keeps what it chose."""

    def __init__(self) -> None:
        self.options: list[ShardingOption] = []

    def __call__(self, options: list[ShardingOption]) -> list[ShardingOption]:
        self.options = options
        return options


def _by_name(spec: PlanSpec, configs: Mapping[str, Config]) -> dict[str, TableEntry]:
    entries = {entry.name: entry for entry in spec.tables}
    for name, entry in entries.items():
        if name not in configs:
            known = ", ".join(map(repr, list(configs)[:8])) + (" and more" if len(configs) > 8 else "")
            raise ConfigError(f"{entry.where}: the model has no table {name!r}; it has {known}")
    return entries


def _constraints(entry: TableEntry, config: Config) -> ParameterConstraints:
    limits: Limits = entry.limits
    features = len(config.feature_names)
    lookups = entry.lookups
    if lookups is not None and len(lookups) not in (1, features):
        raise ConfigError(f"{entry.where}.lookups: got {len(lookups)}, wanted one for each of {features} features")
    return ParameterConstraints(
        compute_kernels=list(limits.compute_kernels) if limits.compute_kernels else None,
        sharding_types=list(limits.sharding_types) if limits.sharding_types else None,
        min_partition=limits.min_partition,
        cache_params=CacheParams(load_factor=limits.load_factor) if limits.load_factor else None,
        pooling_factors=_for_each(lookups or (1.0,), features),
    )


def _for_each(lookups: tuple[float, ...], features: int) -> list[float]:
    return list(lookups) * features if len(lookups) == 1 else list(lookups)


__all__ = ["Planned", "make_plan"]
