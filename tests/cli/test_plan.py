"""What is reported of a plan is what the planner says, and what follows from it."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.cli.files import TABLES, described, make_model, write
from torchrec_turbossd.cli.plan import Planned, make_plan
from torchrec_turbossd.cli.report import PlanReport, load_report
from torchrec_turbossd.cli.spec import read_spec
from torchrec_turbossd.cli.tables import print_plan
from torchrec_turbossd.errors import BudgetError, ConfigError, CorruptError, FormatVersionError
from torchrec_turbossd.planner import Machine, describe_plan
from torchrec_turbossd.sharding import get_turbo_ssd_sharders
from torchrec_turbossd.sizing import AccessProfile, HitRateCurve

NO_TIER = "500 MiB"
"""DRAM of a rank that row stores and tables need for themselves."""

DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"])


def planned(folder: Path, whole: dict[str, Any], **kwargs: Any) -> Planned:
    spec = read_spec(write(folder / "plan.yaml", whole), of_model=bool(kwargs.get("model")))
    return make_plan(spec, where="plan.yaml", **kwargs)


@DEVICES
def test_figures_are_the_planners(device: str, tmp_path: Path) -> None:
    made = planned(tmp_path, described(device))
    report, memory = made.report, "HBM" if device == "cuda" else "DRAM"
    assert [table.name for table in report.tables] == ["big", "wide", "events", "clicks", "tiny"]
    fused_params = {"optimizer": read_spec(tmp_path / "plan.yaml").optimizer}
    rows = describe_plan(made.plan, made.model, get_turbo_ssd_sharders(fused_params=fused_params))
    shards = {(t.module, t.name, s.rank, s.first_row, s.first_col): (t, s) for t in report.tables for s in t.shards}
    assert len(shards) == len(rows)
    for row in rows:
        table, shard = shards[row.module, row.table, row.rank, row.first_row, row.first_col]
        assert (table.tier, table.sharding_type, table.compute_kernel) == (
            row.tier,
            row.sharding_type,
            row.compute_kernel,
        )
        assert (shard.rows, shard.cols, shard.slots, shard.ssd_bytes) == (row.rows, row.cols, row.slots, row.ssd_bytes)
        assert shard.hit_rate == row.hit_rate and shard.fast_bytes == row.fast_bytes
        assert (shard.dram_slots, shard.dram_hit_rate) == (row.dram_slots or 0, row.dram_hit_rate or 0)
    tiers = {table.name: table.tier for table in report.tables}
    assert tiers["big"] == "SSD" and tiers["tiny"] == memory
    assert report.machine.fast_memory == memory and report.machine.ranks == 2


@DEVICES
def test_sums_add_up(device: str, tmp_path: Path) -> None:
    whole = described(device)
    if device == "cuda":
        whole["topology"]["dram"] = NO_TIER
    report = planned(tmp_path, whole).report
    # 4, 3, 10, 1 and 1 lookups of 128 samples on two ranks.
    assert [table.lookups for table in report.tables] == [1024, 768, 2560, 256, 256]
    assert report.lookups == 4864 == pytest.approx(sum(rank.lookups for rank in report.ranks))
    hits = sum(table.lookups * table.hit_rate for table in report.tables)
    assert report.hit_rate == pytest.approx(hits / 4864)
    for rank in report.ranks:
        shards = [s for table in report.tables for s in table.shards if s.rank == rank.rank]
        assert rank.ms.total == pytest.approx(sum(s.ms.total for s in shards))
        assert rank.ms.total == pytest.approx(rank.ms.compute + rank.ms.communication + rank.ms.ssd)
        assert rank.fast_used_bytes == sum(s.fast_bytes + s.io_bytes for s in shards)
        assert rank.fast_capacity_bytes == 32 << 20
        assert rank.fast_reserved_bytes == pytest.approx(0.1 * (32 << 20), abs=1)
        assert rank.fast_used_bytes + rank.fast_reserved_bytes + rank.fast_free_bytes == rank.fast_capacity_bytes
        # The caches have what is left over.
        assert 0 <= rank.fast_free_bytes < 1000
        assert rank.step_ms == pytest.approx(max(rank.ms.compute + rank.ms.communication, rank.ms.ssd))
    assert report.step_ms == max(rank.step_ms for rank in report.ranks)
    assert report.ranks[report.slowest_rank].step_ms == report.step_ms
    big = report.tables[0]
    assert big.memory_bytes == 400_000 * (64 * 4 + 4) and big.lookups_per_mib == 1024 * 2**20 / big.memory_bytes
    assert big.ssd_bytes == big.memory_bytes and big.slot_share == (big.slots or 0) / 400_000


def test_ssd_time_is_misses_by_reads_a_second(tmp_path: Path) -> None:
    whole = described("cuda", ranks=1)
    whole["topology"] |= {"ssd_writes_per_read": 0, "dram": NO_TIER}
    report = planned(tmp_path, whole).report
    misses = sum(table.lookups * (1 - table.hit_rate) for table in report.tables)
    assert misses > 0 and report.ranks[0].ms.ssd == pytest.approx(1000 * misses / 100_000)


def test_the_dram_tier_is_reported(tmp_path: Path) -> None:
    whole = described("cuda", ranks=1)
    whole["topology"] |= {"ssd_writes_per_read": 0, "dram": "900 MiB", "host_to_device_bandwidth": "1 GB/s"}
    report = planned(tmp_path, whole).report
    big = report.tables[0]
    (shard,) = big.shards
    assert big.dram_slots == shard.dram_slots > 50_000 and 0.1 < big.dram_hit_rate == shard.dram_hit_rate
    assert shard.dram_bytes > shard.dram_slots * 272 and report.ranks[0].dram_used_bytes >= shard.dram_bytes
    # A row of 260 bytes takes 0.26 us on the link, a read 10 us.
    rest = 1 - shard.hit_rate - shard.dram_hit_rate
    assert shard.ms.ssd == pytest.approx(shard.lookups * (shard.dram_hit_rate * 0.26e-3 + rest * 0.01))
    on_ssd = [table for table in report.tables if table.tier == "SSD"]
    found = sum(table.lookups * table.dram_hit_rate for table in on_ssd) / sum(table.lookups for table in on_ssd)
    assert report.dram_hit_rate_on_ssd == pytest.approx(found) and report.warnings == []
    more = report.one_more_gib
    # All tables are in slots then.
    assert more is not None and more.ssd_ms_now == pytest.approx(report.ranks[0].ms.ssd) and more.ssd_ms < 1e-9
    said = format_of(report)
    assert f", {found:.2%} more in DRAM. " in said and " ms for DRAM and SSD on a rank" in said
    assert "miss ms" in said and "in DRAM" in said and "from DRAM" in said
    without = format_of(planned(tmp_path, described("cpu")).report)
    assert "SSD ms" in without and "more in DRAM" not in without and "from DRAM" not in without


def test_one_more_gib_counts_the_tier(tmp_path: Path) -> None:
    tables = [{"name": "big", "rows": 20_000_000, "dim": 64, "lookups": 4, "access": {"zipf": 0.8}}]
    whole = described("cuda", fast="200 MiB", ranks=1, tables=tables)
    whole["topology"]["dram"] = "4 GiB"
    report = planned(tmp_path, whole).report
    (big,), more = report.tables, report.one_more_gib
    assert big.dram_slots > 5_000_000 and more is not None and report.hit_rate < more.hit_rate < 0.95
    assert 0.5 * more.ssd_ms_now < more.ssd_ms < 0.99 * more.ssd_ms_now


def format_of(report: PlanReport) -> str:
    console = Console(width=300, record=True, file=io.StringIO())
    print_plan(report, console=console)
    return " ".join(console.export_text().split())


def test_speeds_and_lookups_arrive(tmp_path: Path) -> None:
    tables = [
        {"name": "big", "rows": 400_000, "dim": 64, "features": ["a", "b"], "lookups": 3},
        {"name": "copied", "rows": 100, "dim": 64, "constraints": {"sharding_types": "data_parallel"}},
    ]
    whole = described("cuda", fast="20 MiB", tables=tables)
    whole["topology"] |= {"hbm_bandwidth": "2 TB/s", "intra_host_bandwidth": 100, "ssd_bandwidth": "0.2 GB/s"}
    whole["topology"]["dram"] = NO_TIER
    report = planned(tmp_path, whole).report
    assert (report.machine.hbm_bandwidth, report.machine.intra_host_bandwidth) == pytest.approx((2e12, 1e11))
    big, copied = report.tables
    assert big.lookups == 2 * 3 * 128 * 2 and copied.lookups == 128 * 2
    # A replica answers its own rank's batch.
    assert [shard.lookups for shard in copied.shards] == [128, 128]
    # A read is 10 us; its block, and the row that is written back, take longer.
    misses = sum(shard.lookups * (1 - shard.hit_rate) for shard in big.shards)
    expected = misses * (4096 + 4 * 64 + 4) / 2e5
    assert big.tier == "SSD" and sum(shard.ms.ssd for shard in big.shards) == pytest.approx(expected)


def test_one_more_gib_is_what_a_gib_more_gives(tmp_path: Path) -> None:
    tables = [{"name": "big", "rows": 200_000_000, "dim": 64, "lookups": 4}]
    whole = described("cuda", fast="2 GiB", ranks=1, tables=tables, reserve=0)
    whole["topology"]["ssd"] = "100 GiB"
    report = planned(tmp_path, whole).report
    whole["topology"]["hbm"] = "3 GiB"
    then = planned(tmp_path, whole).report
    assert report.one_more_gib is not None and then.tables[0].tier == "SSD"
    assert report.one_more_gib.hit_rate == pytest.approx(then.hit_rate, abs=1e-4)
    assert then.hit_rate > report.hit_rate + 0.01
    assert report.one_more_gib.ssd_ms == pytest.approx(then.ranks[0].ms.ssd, rel=2e-2)
    assert report.one_more_gib.ssd_ms_now == report.ranks[0].ms.ssd


def test_nothing_on_ssd(tmp_path: Path) -> None:
    report = planned(tmp_path, described("cpu", fast="2 GiB")).report
    assert report.hit_rate == 1 and report.hit_rate_on_ssd is None and report.one_more_gib is None


def test_profiles_come_from_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    trace = (rng.random(20_000) ** 6 * 1000).astype(np.int64)
    np.save(tmp_path / "trace.npy", trace)
    np.save(tmp_path / "counts.npy", np.bincount(trace, minlength=1000))
    AccessProfile.zipf(1000, 0.7).save(tmp_path / "profile.json")
    sources = [{"trace": "trace.npy"}, {"counts": "counts.npy"}, {"profile": "profile.json"}, {"zipf": 1.3}]
    limits = {"compute_kernels": "key_value", "load_factor": 0.1}
    tables = [
        {"name": f"t{n}", "rows": 1000, "dim": 64, "access": source, "constraints": limits}
        for n, source in enumerate([*sources, None])
    ]
    report = planned(tmp_path, described("cpu", ranks=1, tables=tables)).report
    made = [
        AccessProfile.from_trace(trace, 1000),
        AccessProfile.from_counts(np.bincount(trace, minlength=1000)),
        AccessProfile.zipf(1000, 0.7),
        AccessProfile.zipf(1000, 1.3),
        AccessProfile.zipf(1000),
    ]
    assert [table.slots for table in report.tables] == [100] * 5 and all(table.forced for table in report.tables)
    rates = [HitRateCurve(profile).hit_rate(100) for profile in made]
    assert [table.hit_rate for table in report.tables] == pytest.approx(rates) and len(set(rates)) == 5
    assert [table.access for table in report.tables][3:] == ["Zipf 1.3", "default: Zipf 1.05"]


@pytest.mark.parametrize(
    ("access", "said"),
    [
        ({"profile": "no.json"}, r"tables\[0\]\.access\.profile: .*no\.json cannot be read"),
        (
            {"profile": "plan.yaml"},
            "is of no use: .*is not a torchrec_turbossd access profile|is of no use: .*is not a whole ",
        ),
        ({"counts": "counts.npy"}, "is about 5 rows, the table has 1,000"),
        ({"trace": "counts.npy"}, "is of no use: the table has rows 0 to 999"),
        ({"counts": "plan.yaml"}, "is of no use"),
    ],
)
def test_files_of_no_use_are_named(access: dict[str, str], said: str, tmp_path: Path) -> None:
    np.save(tmp_path / "counts.npy", np.arange(5) * 1000)
    tables = [{"name": "t", "rows": 1000, "dim": 4, "access": access}]
    with pytest.raises(ConfigError, match=said):
        planned(tmp_path, described("cpu", tables=tables))


@DEVICES
def test_a_model_is_planned(device: str, tmp_path: Path) -> None:
    whole = described(device, tables=[{"name": "big", "lookups": [3, 2], "access": {"zipf": 1.2}}])
    report = planned(tmp_path, whole, model=make_model()).report
    by_name = {table.name: table for table in report.tables}
    assert set(by_name) == {"big", "tiny", "events"} and by_name["big"].module == "bags"
    assert by_name["big"].lookups == 5 * 128 * 2 and by_name["big"].access == "Zipf 1.2"
    assert by_name["big"].features == ["a", "b"] and by_name["events"].kind == "sequence"
    with pytest.raises(ConfigError, match="the model has no table 'bag'; it has 'big', 'tiny', 'events'"):
        planned(tmp_path, described(device, tables=[{"name": "bag"}]), model=make_model())
    with pytest.raises(ConfigError, match="got 3, wanted one for each of 2 features"):
        planned(tmp_path, described(device, tables=[{"name": "big", "lookups": [1, 2, 3]}]), model=make_model())


def test_machines_are_measured_or_said(tmp_path: Path) -> None:
    machine = Machine(
        compute_device="cuda",
        local_world_size=2,
        hbm_cap=32 << 20,
        ddr_cap=1 << 30,
        ssd_cap=10 << 30,
        ssd_reads_per_s=100_000,
        ssd_bytes_per_s=1e9,
        hbm_mem_bw=2e9,
        notes=("measured",),
    )
    some = [TABLES[0], TABLES[4]]
    report = planned(tmp_path, described("cuda", topology={}, tables=some), machine=machine).report
    assert (report.machine.ranks, report.machine.hbm_bytes, report.machine.hbm_bandwidth) == (2, 32 << 20, 2e12)
    assert report.machine.notes == ["measured"]
    # What four ranks of a host share is half of what two do; HBM is each rank's own.
    hosts = described("cuda", topology={"ranks": 8, "ranks_per_host": 4}, tables=some)
    report = planned(tmp_path, hosts, machine=machine).report
    said = report.machine
    assert (said.ranks, said.ranks_per_host, said.hbm_bytes, said.dram_bytes) == (8, 4, 32 << 20, 1 << 29)
    assert (said.ssd_reads_per_second, said.ssd_bytes) == (50_000, 5 << 30)
    with pytest.raises(ConfigError, match=r"3 ranks on how many hosts\? .*measured for 2 on a host"):
        planned(tmp_path, described("cuda", topology={"ranks": 3}), machine=machine)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"topology": {}}, "device, ranks, ssd missing"),
        ({"topology": {"device": "cuda"}}, "ranks, hbm, ssd missing"),
        (
            {"topology": {"device": "cpu", "ranks": 1, "dram": 1, "ssd": 1}},
            "ssd_reads_per_second or ssd_bandwidth missing",
        ),
        ({"batch_size": None}, "batch_size missing"),
    ],
)
def test_what_is_missing_is_named(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"plan.yaml: (topology: )?{said}"):
        planned(tmp_path, described("cpu", **changed))


def test_what_does_not_fit_is_explained(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"no plan fits\. HBM: the tables take at least .* What would do: raise"):
        planned(tmp_path, described("cuda", fast="1 MiB"))


@DEVICES
def test_reports_are_read_as_they_were_written(device: str, tmp_path: Path) -> None:
    report, path = planned(tmp_path, described(device)).report, tmp_path / "out.json"
    path.write_text(report.to_json())
    read: PlanReport = load_report(path)
    assert read == report and dataclasses.asdict(read) == dataclasses.asdict(report)
    path.write_text(report.to_json().replace('"version": 1', '"version": 2', 1))
    with pytest.raises(FormatVersionError, match="upgrade"):
        load_report(path)
    for broken in (
        report.to_json()[:-20],
        "[]",
        '{"format": "other"}',
        '{"format": "torchrec_turbossd plan", "version": 1}',
    ):
        path.write_text(broken)
        with pytest.raises(CorruptError):
            load_report(path)


def put(whole: Any, place: list[Any], value: Any) -> None:
    for key in place[:-1]:
        whole = whole[key]
    whole[place[-1]] = value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((["version"], value) for value in (0, -1, 1.5, True, float("nan"), "1", None)),
        (["step_ms"], "fast"),
        (["step_ms"], float("nan")),
        (["step_ms"], float("inf")),
        (["step_ms"], 10**400),
        (["step_ms"], True),
        (["slowest_rank"], 99),
        (["hit_rate"], -5),
        (["hit_rate"], 1.5),
        (["hit_rate_on_ssd"], "x"),
        (["machine"], []),
        (["machine", "notes"], "abc"),
        (["machine", "ranks"], 1.5),
        (["machine", "device"], None),
        (["ranks"], {}),
        (["ranks", 0, "ms"], None),
        (["ranks", 0, "tables"], -1),
        (["tables", 0, "forced"], 1),
        (["tables", 0, "features"], [1]),
        (["tables", 0, "name"], "\ud800"),
        (["tables", 0, "colour"], "red"),
    ],
)
def test_damaged_reports_are_refused(place: list[Any], value: Any, report: str, tmp_path: Path) -> None:
    whole, path = json.loads(report), tmp_path / "out.json"
    put(whole, place, value)
    path.write_text(json.dumps(whole))
    with pytest.raises(CorruptError, match=r"out\.json"):
        load_report(path)


def test_deep_reports_are_refused(report: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text(report.replace('"warnings": ', '"warnings": ' + 100_000 * "[" + 100_000 * "]" + ', "x": '))
    with pytest.raises(CorruptError, match=r"out\.json"):
        load_report(path)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    return planned(tmp_path_factory.mktemp("report"), described("cuda", ranks=1)).report.to_json()
