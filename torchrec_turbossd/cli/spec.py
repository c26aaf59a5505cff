"""What is to be planned, read from a file: tables, the machines, and how training runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn

from torchrec_turbossd.cli.document import Entry, read_document
from torchrec_turbossd.errors import ConfigError
from torchrec_turbossd.planner import TURBO_SSD
from torchrec_turbossd.planner.machine import MOST_RANKS_OF_A_HOST
from torchrec_turbossd.tbe.training_options import ROW_STATE

DEVICES = ("cpu", "cuda")
DATA_TYPES = ("fp32", "fp16")
KINDS = ("bag", "sequence")
POOLINGS = ("sum", "mean")
KERNELS = ("fused", "dense", "key_value", TURBO_SSD)
SHARDING_TYPES = (
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
    "data_parallel",
)
DEFAULT_RESERVE = 0.15
"""Share of fast memory that tables may not have, where nothing is said: as much as TorchRec's planner keeps back."""

MOST_RANKS = 4_096
"""Planning takes time for each."""

MOST_SAMPLES = 2**31
READS = "reads per second"
_MOST_ROWS, _MOST_DIM, _MOST_BATCHES = 10**12, 16_384, 1_000
_MOST_LOOKUPS, _MOST_ALPHA, _MOST_WRITES = 1e9, 100.0, 1e6
_SIZES = ("hbm", "dram", "ssd")
_SPEEDS = (
    "hbm_bandwidth",
    "dram_bandwidth",
    "host_to_device_bandwidth",
    "intra_host_bandwidth",
    "inter_host_bandwidth",
    "ssd_bandwidth",
)
_READS = ("ssd_reads_per_second", "ssd_writes_per_read")
_TOP = ("tables", "batch_size", "optimizer", "topology", "machine", "batches_in_flight", "reserve")
_OF_ANY_TABLE = ("name", "lookups", "access", "constraints")
_OF_A_TABLE = ("name", "rows", "dim", "data_type", "kind", "pooling", "features", "lookups", "access", "constraints")


@dataclass(frozen=True, kw_only=True)
class AccessSpec:
    """Where a table's access profile comes from.

    Attributes:
        kind: "zipf", "profile", "counts" or "trace".
        alpha: exponent of "zipf".
        path: file of the others.
        where: place to name in errors.
    """

    kind: str
    where: str
    alpha: float = 0.0
    path: Path = Path()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the planner may do with a table; None: whatever is best."""

    compute_kernels: tuple[str, ...] | None = None
    sharding_types: tuple[str, ...] | None = None
    min_partition: int | None = None
    load_factor: float | None = None


@dataclass(frozen=True, kw_only=True)
class TableEntry:
    """One table.

    Attributes:
        name: unique.
        rows, dim: shape; None where a model says.
        data_type: "fp32" or "fp16".
        kind: "bag" (pooled) or "sequence".
        pooling: "sum" or "mean", of bags.
        features: names of those that look it up.
        lookups: of one sample, by feature, or one number for all; None where nothing is said.
        access: how often its rows are asked for; None: the default profile.
        limits: the user's constraints.
        where: place to name in errors.
    """

    name: str
    where: str
    rows: int | None = None
    dim: int | None = None
    data_type: str = "fp32"
    kind: str = "bag"
    pooling: str = "sum"
    features: tuple[str, ...] = ()
    lookups: tuple[float, ...] | None = None
    access: AccessSpec | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The machines; None where nothing is said. Sizes are bytes of a rank, bandwidths bytes per second of a rank."""

    device: str | None = None
    ranks: int | None = None
    ranks_per_host: int | None = None
    hbm: int | None = None
    dram: int | None = None
    ssd: int | None = None
    hbm_bandwidth: float | None = None
    dram_bandwidth: float | None = None
    host_to_device_bandwidth: float | None = None
    intra_host_bandwidth: float | None = None
    inter_host_bandwidth: float | None = None
    ssd_bandwidth: float | None = None
    ssd_reads_per_second: float | None = None
    ssd_writes_per_read: float | None = None


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """Everything that a plan is made of, but for a model that is Python code.

    Attributes:
        tables: in the order of the file.
        hardware: what the file says of the machines.
        machine: file of measured machines, which `hardware` overrides.
        optimizer: FBGEMM's.
        batch_size: of one rank; None where nothing is said.
        batches_in_flight: batches whose rows are in slots at once.
        reserve: share of each rank's fast memory that tables may not have, 0 to 1.
    """

    tables: tuple[TableEntry, ...] = ()
    hardware: Hardware = field(default_factory=Hardware)
    machine: Path | None = None
    optimizer: EmbOptimType = EmbOptimType.EXACT_SGD
    batch_size: int | None = None
    batches_in_flight: int = 2
    reserve: float = DEFAULT_RESERVE


def read_spec(path: Path, *, of_model: bool = False) -> PlanSpec:
    """Read a YAML or JSON file.

    Args:
        path: the file; relative paths in it are relative to it.
        of_model: a model says what tables there are, so that the file only adds to them.

    Raises:
        ConfigError: anything that is not as documented, with its place.
    """
    document = read_document(path)
    found = document.keys(_TOP, () if of_model else ("tables",))
    folder = path.parent
    tables = found["tables"].entries("a list of tables") if "tables" in found else []
    return PlanSpec(
        tables=_different([_table(entry, folder, of_model) for entry in tables]),
        hardware=_hardware(found["topology"]) if "topology" in found else Hardware(),
        machine=folder / found["machine"].text("the path of a measured machine") if "machine" in found else None,
        optimizer=_optimizer(found["optimizer"]) if "optimizer" in found else EmbOptimType.EXACT_SGD,
        batch_size=found["batch_size"].count(MOST_SAMPLES) if "batch_size" in found else None,
        batches_in_flight=found["batches_in_flight"].count(_MOST_BATCHES) if "batches_in_flight" in found else 2,
        reserve=_reserve(found["reserve"]) if "reserve" in found else DEFAULT_RESERVE,
    )


def _different(tables: list[TableEntry]) -> tuple[TableEntry, ...]:
    first: dict[str, TableEntry] = {}
    for table in tables:
        known = first.setdefault(table.name, table)
        if known is not table:
            raise ConfigError(f"{table.where}: a second table {table.name!r}; the first is at {known.where}")
    return tuple(tables)


def _table(entry: Entry, folder: Path, of_model: bool) -> TableEntry:
    if of_model and isinstance(entry.value, dict):
        for key in set(_OF_A_TABLE) - set(_OF_ANY_TABLE):
            if key in entry.value:
                raise ConfigError(f"{entry.value[key].where}: the model says that, leave it out")
    keys, required = (_OF_ANY_TABLE, ("name",)) if of_model else (_OF_A_TABLE, ("name", "rows", "dim"))
    found = entry.keys(keys, required)
    name = found["name"].text("the table's name")
    if "." in name or hasattr(nn.ModuleDict(), name):
        # TorchRec keeps tables in a ModuleDict, by name.
        found["name"].fail("another name: one without dots, and none of the methods of PyTorch's ModuleDict")
    kind = found["kind"].one_of(KINDS) if "kind" in found else "bag"
    if kind == "sequence" and "pooling" in found:
        raise ConfigError(f"{found['pooling'].where}: a sequence has no pooling, leave it out")
    features = found["features"].texts("a list of names") if "features" in found else (name,)
    return TableEntry(
        name=name,
        where=entry.where,
        rows=found["rows"].count(_MOST_ROWS) if "rows" in found else None,
        dim=found["dim"].count(_MOST_DIM) if "dim" in found else None,
        data_type=found["data_type"].one_of(DATA_TYPES) if "data_type" in found else "fp32",
        kind=kind,
        pooling=found["pooling"].one_of(POOLINGS) if "pooling" in found else "sum",
        features=() if of_model else features,
        lookups=_lookups(found["lookups"], None if of_model else features) if "lookups" in found else None,
        access=_access(found["access"], folder) if "access" in found else None,
        limits=_limits(found["constraints"]) if "constraints" in found else Limits(),
    )


def _lookups(entry: Entry, features: tuple[str, ...] | None) -> tuple[float, ...]:
    wanted = "lookups of one sample: a number, or a list of one for each feature"
    if not isinstance(entry.value, list):
        return (entry.number(wanted, most=_MOST_LOOKUPS),)
    numbers = tuple(one.number(most=_MOST_LOOKUPS) for one in entry.entries(wanted))
    if features is not None and len(numbers) != len(features):
        raise ConfigError(f"{entry.where}: got {len(numbers)} numbers, wanted one for each of {len(features)} features")
    return numbers


def _access(entry: Entry, folder: Path) -> AccessSpec:
    kinds = ("zipf", "profile", "counts", "trace")
    found = entry.keys(kinds)
    if len(found) != 1:
        raise ConfigError(f"{entry.where}: got {len(found)} of {', '.join(kinds)}, wanted exactly one")
    ((kind, value),) = found.items()
    if kind == "zipf":
        return AccessSpec(kind=kind, where=value.where, alpha=value.number("an exponent", most=_MOST_ALPHA))
    return AccessSpec(kind=kind, where=value.where, path=folder / value.text("the path of a file"))


def _limits(entry: Entry) -> Limits:
    found = entry.keys(("compute_kernels", "sharding_types", "min_partition", "load_factor"))
    return Limits(
        compute_kernels=_choices(found["compute_kernels"], KERNELS) if "compute_kernels" in found else None,
        sharding_types=_choices(found["sharding_types"], SHARDING_TYPES) if "sharding_types" in found else None,
        min_partition=found["min_partition"].count(_MOST_DIM) if "min_partition" in found else None,
        load_factor=_share(found["load_factor"]) if "load_factor" in found else None,
    )


def _choices(entry: Entry, choices: tuple[str, ...]) -> tuple[str, ...]:
    wanted = f"one or more of {', '.join(choices)}"
    names = entry.texts(wanted)
    if not set(names) <= set(choices):
        raise ConfigError(f"{entry.where}: got {', '.join(map(repr, names))}, wanted {wanted}")
    return names


def _share(entry: Entry) -> float:
    wanted = "a share of the rows, above 0 and at most 1"
    share = entry.number(wanted)
    if not 0 < share <= 1:
        entry.fail(wanted)
    return share


def _hardware(entry: Entry) -> Hardware:
    found = entry.keys(("device", "ranks", "ranks_per_host", *_SIZES, *_SPEEDS, *_READS))
    device = found["device"].one_of(DEVICES) if "device" in found else None
    if device == "cpu" and "hbm" in found:
        raise ConfigError(f"{found['hbm'].where}: a cpu has none: its slots are in `dram`")
    said: dict[str, Any] = {name: found[name].size() for name in _SIZES if name in found}
    said |= {name: found[name].speed() for name in _SPEEDS if name in found}
    most = {"ranks": MOST_RANKS, "ranks_per_host": MOST_RANKS_OF_A_HOST}
    said |= {name: found[name].count(count) for name, count in most.items() if name in found}
    if "ssd_reads_per_second" in found:
        said["ssd_reads_per_second"] = found["ssd_reads_per_second"].number(READS, least=1.0)
    if "ssd_writes_per_read" in found:
        said["ssd_writes_per_read"] = found["ssd_writes_per_read"].number(
            "rows written for each one read", most=_MOST_WRITES
        )
    return Hardware(device=device, **said)


def _optimizer(entry: Entry) -> EmbOptimType:
    names = {name: one for one in ROW_STATE for name in (str(one.value).lower(), one.name.lower())}
    word = entry.value.lower() if isinstance(entry.value, str) else None
    if word not in names:
        entry.fail(f"FBGEMM's name of an optimizer: {', '.join(sorted({str(one.value) for one in ROW_STATE}))}")
    return names[word]


def _reserve(entry: Entry) -> float:
    wanted = "percent of fast memory that tables may not have, from 0 and below 100"
    given = entry.value.strip().removesuffix("%") if isinstance(entry.value, str) else entry.value
    percent = Entry(given, entry.place, entry.file, entry.line).number(wanted)
    if not 0 <= percent < 100:
        entry.fail(wanted)
    if 0 < percent < 1 and not str(entry.value).strip().endswith("%"):
        # A share of 1, in all likelihood.
        entry.fail(f'{wanted}; "{percent:g}%", with its sign, where less than one is meant')
    return percent / 100


__all__ = [
    "DATA_TYPES",
    "DEFAULT_RESERVE",
    "DEVICES",
    "KERNELS",
    "KINDS",
    "MOST_RANKS",
    "MOST_SAMPLES",
    "POOLINGS",
    "READS",
    "SHARDING_TYPES",
    "AccessSpec",
    "Hardware",
    "Limits",
    "PlanSpec",
    "TableEntry",
    "read_spec",
]
