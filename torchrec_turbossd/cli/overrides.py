"""What is to be planned when a file and the options of a command both speak: options go first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchrec_turbossd.cli.document import Entry
from torchrec_turbossd.cli.options import PlanOptions
from torchrec_turbossd.cli.spec import (
    DEVICES,
    MOST_RANKS,
    MOST_SAMPLES,
    READS,
    AccessSpec,
    Hardware,
    PlanSpec,
    TableEntry,
)
from torchrec_turbossd.errors import ConfigError
from torchrec_turbossd.planner.machine import MOST_RANKS_OF_A_HOST


def with_options(spec: PlanSpec, options: PlanOptions) -> PlanSpec:
    """`spec` with what the options say instead.

    Raises:
        ConfigError: an option that makes no sense; names it.
    """
    return dataclasses.replace(
        spec,
        tables=_with_profiles(spec.tables, options.profile or [], of_model=options.model is not None),
        hardware=_with_sizes(spec.hardware, options),
        machine=spec.machine if options.machine is None or options.measure else Path(options.machine),
        batch_size=spec.batch_size
        if options.batch_size is None
        else Entry(options.batch_size, file="--batch-size").count(MOST_SAMPLES),
    )


def _with_sizes(hardware: Hardware, options: PlanOptions) -> Hardware:
    said: dict[str, Any] = {}
    for name, most in (("ranks", MOST_RANKS), ("ranks_per_host", MOST_RANKS_OF_A_HOST)):
        count = getattr(options, name)
        said[name] = None if count is None else Entry(count, file=f"--{name.replace('_', '-')}").count(most)
    if options.device is not None:
        said["device"] = Entry(options.device, file="--device").one_of(DEVICES)
        if said["device"] == "cpu" and options.hbm is None:
            # The file's is about the device that the option is instead of.
            hardware = dataclasses.replace(hardware, hbm=None)
    for name in ("hbm", "dram", "ssd"):
        size = getattr(options, name)
        said[name] = None if size is None else Entry(size, file=f"--{name}").size()
    if options.ssd_reads_per_second is not None:
        given = Entry(options.ssd_reads_per_second, file="--ssd-reads-per-second")
        said["ssd_reads_per_second"] = given.number(READS, least=1.0)
    if options.ssd_bandwidth is not None:
        said["ssd_bandwidth"] = Entry(options.ssd_bandwidth, file="--ssd-bandwidth").speed()
    return dataclasses.replace(hardware, **{name: value for name, value in said.items() if value is not None})


def _with_profiles(tables: Sequence[TableEntry], given: Sequence[str], *, of_model: bool) -> tuple[TableEntry, ...]:
    by_name = {table.name: table for table in tables}
    for one in given:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--profile: got {one!r}, wanted TABLE=PATH")
        if name not in by_name and not of_model:
            raise ConfigError(f"--profile: there is no table {name!r}; there are {', '.join(list(by_name)[:8])}")
        table = by_name.get(name, TableEntry(name=name, where="--profile"))
        access = AccessSpec(kind="profile", path=Path(path), where="--profile")
        by_name[name] = dataclasses.replace(table, access=access)
    return tuple(by_name.values())


__all__ = ["with_options"]
