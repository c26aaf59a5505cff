"""A measured machine goes through a file and into a topology; measuring leaves nothing behind and hides nothing."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.planner.types import Topology

from tests.planner.models import Model, sharders
from tests.rules.tree import ROOT
from torchrec_turbossd.errors import ConfigError, CorruptError, FormatVersionError, ReadOnlyStoreError, StoreFullError
from torchrec_turbossd.planner import Machine, SsdSpeed, describe_plan, measure_machine, turbo_ssd_planner
from torchrec_turbossd.planner import disk as disk_module
from torchrec_turbossd.planner.disk import measure_disk
from torchrec_turbossd.planner.disk_reader import read_for
from torchrec_turbossd.planner.machine import FORMAT, VERSION
from torchrec_turbossd.planner.memory_limit import dram_bytes

GB, MIB = 10**9, 1 << 20
MACHINE = Machine(
    compute_device="cuda",
    local_world_size=4,
    hbm_cap=80 * GB,
    ddr_cap=200 * GB,
    ssd_cap=900 * GB,
    ssd_reads_per_s=250_000.0,
    ssd_bytes_per_s=2.0e9,
    hbm_mem_bw=2.5e9,
    ddr_mem_bw=4e7,
    hbm_to_ddr_mem_bw=5e7,
    notes=("measured by hand",),
)
UNKNOWN = {"hbm_mem_bw": None, "ddr_mem_bw": None, "hbm_to_ddr_mem_bw": None}


def test_a_file_gives_back_the_same_machine(tmp_path: Path) -> None:
    for machine in (MACHINE, dataclasses.replace(MACHINE, **UNKNOWN, inter_host_bw=1e6, notes=())):
        machine.save(tmp_path / "m.json")
        assert Machine.load(tmp_path / "m.json") == machine
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MACHINE.save(tmp_path / "m.json")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="broken"):
        dataclasses.replace(MACHINE, notes=()).save(tmp_path / "m.json")
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]
    assert Machine.load(tmp_path / "m.json") == MACHINE


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": "1"},
        {"version": None},
        {"ssd_cap": -1},
        {"ssd_cap": 1.5},
        {"hbm_cap": 0},
        {"ssd_reads_per_s": 0},
        {"ssd_reads_per_s": float("nan")},
        {"ddr_mem_bw": "fast"},
        {"ddr_mem_bw": True},
        {"compute_device": "tpu"},
        {"notes": [1]},
        {"notes": None},
        {"more": 1},
        {"version": 0},
        {"version": -1},
        {"version": 1.5},
        {"version": True},
        {"version": float("nan")},
        {"ssd_reads_per_s": 10**400},
        {"ssd_reads_per_s": 1e-300},
        {"hbm_mem_bw": 10**400},
        {"ddr_cap": 10**30},
        {"local_world_size": 10**9},
        {"notes": "abc"},
        {"notes": {"abc": 1}},
        {"notes": ["\ud800"]},
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "m.json"
    MACHINE.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CorruptError, match=r"m\.json"):
        Machine.load(path)


def test_files_that_are_not_machines_or_newer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    MACHINE.save(path)
    whole = path.read_text()
    lacking = json.loads(whole)
    del lacking["ddr_cap"]
    deep = 100_000 * "[" + 100_000 * "]"
    for text in (
        "",
        "[]",
        whole[:-20],
        json.dumps(lacking),
        deep,
        whole.replace('"notes": [', f'"x": {deep}, "notes": ['),
    ):
        path.write_text(text)
        with pytest.raises(CorruptError):
            Machine.load(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CorruptError):
        Machine.load(path)
    path.write_text(whole.replace('"version": 1', '"version": 2').replace('"ssd_cap"', '"ssd_bytes"'))
    with pytest.raises(FormatVersionError, match="upgrade"):
        Machine.load(path)
    with pytest.raises(FileNotFoundError):
        Machine.load(tmp_path / "absent")


def test_the_format_has_a_page_that_names_every_field(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "formats" / "machine.md").read_text(encoding="utf-8")
    assert f'`"{FORMAT}"`' in page and f"| `version` | {VERSION}. " in page
    assert all(f"`{field.name}`" in page for field in dataclasses.fields(Machine))


@pytest.mark.parametrize(
    "change", [{"local_world_size": 0}, {"ddr_cap": True}, {"inter_host_bw": float("inf")}, {"notes": "text"}]
)
def test_absurd_machines(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(MACHINE, **change)


def test_a_topology_has_what_the_machine_has() -> None:
    made = MACHINE.topology(8)
    assert (made.compute_device, made.world_size, made.local_world_size) == ("cuda", 8, 4)
    assert [(d.storage.hbm, d.storage.ddr, d.storage.ssd) for d in made.devices] == [(80 * GB, 200 * GB, 900 * GB)] * 8
    assert (made.hbm_mem_bw, made.ddr_mem_bw, made.hbm_to_ddr_mem_bw) == (2.5e9, 4e7, 5e7)
    # Without a word about reads a second, random reads of blocks are what the bandwidth has to mean.
    assert made.ssd_mem_bw == pytest.approx(250_000 * 4096 / 1000)
    narrow = dataclasses.replace(MACHINE, ssd_bytes_per_s=5e8).topology(4)
    assert narrow.ssd_mem_bw == pytest.approx(5e5)
    default = Topology(world_size=8, local_world_size=4, compute_device="cuda")
    assert (made.intra_host_bw, made.inter_host_bw) == (default.intra_host_bw, default.inter_host_bw)
    plain = dataclasses.replace(MACHINE, **UNKNOWN, intra_host_bw=3.0, inter_host_bw=2.0).topology(4)
    assert (plain.hbm_mem_bw, plain.ddr_mem_bw) == (default.hbm_mem_bw, default.ddr_mem_bw)
    assert (plain.intra_host_bw, plain.inter_host_bw) == (3.0, 2.0)


def test_a_full_disk_is_not_the_default_one() -> None:
    full = dataclasses.replace(MACHINE, compute_device="cpu", hbm_cap=0, ssd_cap=0, local_world_size=1).topology(1)
    (device,) = full.devices
    assert device.storage.ssd <= 1 and device.storage.hbm == 0


@pytest.mark.parametrize("world", [0, 6, True, 2.0])
def test_ranks_that_are_no_whole_hosts(world: Any) -> None:
    with pytest.raises(ConfigError, match="world_size"):
        MACHINE.topology(world)


def test_a_machine_plans() -> None:
    small = dataclasses.replace(MACHINE, hbm_cap=GB)
    assert small.ssd == SsdSpeed(reads_per_s=250_000, bytes_per_s=2e9, writes_per_read=1)
    made = turbo_ssd_planner(small.topology(4), 64, ssd=small.ssd)
    (row,) = describe_plan(made.plan(Model(("t", 20_000_000, 128)), sharders()))[:1]
    assert row.tier == "SSD" and row.slots is not None


def fake_proc(root: Path, mounts: str, groups: str, limits: dict[str, str]) -> Path:
    """A /proc of a machine of 8 GiB, and control groups below `root` with files as `limits` says."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text("MemTotal:        8388608 kB\nMemFree: 1 kB\n")
    (root / "proc" / "self" / "mounts").write_text(mounts.replace("ROOT", str(root)))
    (root / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in limits.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "proc"


V1 = "cgroup ROOT/cpu cgroup rw,cpu 0 0\ncgroup ROOT/memory cgroup rw,relatime,memory 0 0\n"
V2 = "proc /proc proc rw 0 0\ncgroup2 ROOT/unified cgroup2 rw 0 0\n"


@pytest.mark.parametrize(
    ("mounts", "groups", "limits", "expected"),
    [
        (V1, "4:memory:/a/b\n", {"memory/a/b/memory.limit_in_bytes": "9223372036854771712\n"}, 8 << 30),
        (V1, "4:memory:/a/b\n", {"memory/a/b/memory.limit_in_bytes": "1000\n"}, 1000),
        # A group above limits too.
        (V1, "4:memory:/a/b\n", {"memory/a/memory.limit_in_bytes": "900\n"}, 900),
        # A container sees its own group as the mount.
        (V1, "4:memory:/docker/x\n", {"memory/memory.limit_in_bytes": "800\n"}, 800),
        (V1, "3:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "1000\n"}, 8 << 30),
        (V2, "0::/a/b\n", {"unified/a/b/memory.max": "max\n", "unified/a/memory.max": "700\n"}, 700),
        (V2, "0::/a/b\n", {"unified/a/b/memory.max": "max\n"}, 8 << 30),
        (V2, "0::/../outside\n", {"unified/memory.max": "600\n"}, 600),
        (V1 + V2, "4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "500"}, 500),
        ("", "", {}, 8 << 30),
    ],
)
def test_dram_is_what_the_control_group_leaves(
    tmp_path: Path, mounts: str, groups: str, limits: dict[str, str], expected: int
) -> None:
    found, said = dram_bytes(fake_proc(tmp_path, mounts, groups, limits))
    assert found == expected
    assert said == ("MemTotal" if expected == 8 << 30 else "the control group's limit")


def test_dram_of_this_machine(tmp_path: Path) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < dram_bytes()[0] <= physical
    assert dram_bytes(tmp_path) == (physical, "MemTotal")


def test_a_machine_is_measured(tmp_path: Path) -> None:
    begin = time.monotonic()
    one = measure_machine(tmp_path, compute_device="cpu", seconds=0.8, file_bytes=32 * MIB)
    assert time.monotonic() - begin < 20
    assert (one.compute_device, one.local_world_size, one.hbm_cap) == ("cpu", 1, 0)
    assert one.hbm_mem_bw is None and one.hbm_to_ddr_mem_bw is None and one.intra_host_bw is None
    stats = os.statvfs(tmp_path)
    assert one.ssd_cap == pytest.approx(stats.f_bavail * stats.f_frsize, rel=0.2)
    assert one.ddr_cap == dram_bytes()[0]
    # From 0.1 to 1000 GB/s: nothing that is a machine lies outside, and a unit that is wrong by 1000 does.
    assert 1e5 < (one.ddr_mem_bw or 0) < 1e9
    assert one.ssd_reads_per_s > 10 and one.ssd_bytes_per_s > one.ssd_reads_per_s * 100
    assert list(tmp_path.iterdir()) == []
    notes = " ".join(one.notes)
    assert all(word in notes for word in ("DRAM", "SSD", "assumed: intra_host_bw", "32.00 MiB", "page cache"))
    one.save(tmp_path / "m.json")
    assert Machine.load(tmp_path / "m.json") == one


def test_ranks_share_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = disk_module.DiskSpeed(
        reads_per_s=8000.0,
        bytes_per_s=8e8,
        written_bytes_per_s=1e8,
        file_bytes=MIB,
        direct=False,
        file_system="tmpfs",
    )
    monkeypatch.setattr("torchrec_turbossd.planner.measure.measure_disk", lambda *_, **__: speed)
    monkeypatch.setattr("torchrec_turbossd.planner.measure.free_bytes", lambda _: 4001)
    monkeypatch.setattr("torchrec_turbossd.planner.measure.dram_bytes", lambda: (64 * MIB, "MemTotal"))
    shared = measure_machine(tmp_path, compute_device="cpu", local_world_size=4, seconds=0.1)
    assert (shared.ddr_cap, shared.ssd_cap) == (16 * MIB, 1000)
    assert (shared.ssd_reads_per_s, shared.ssd_bytes_per_s) == (2000, 2e8)
    notes = " ".join(shared.notes)
    assert "divided among 4 ranks" in notes and "memory and not an SSD" in notes and "may sit in caches" in notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_world_size": 0}, "local_world_size must be"),
        ({"file_bytes": 1000}, "file_bytes must be"),
        ({"seconds": 0.0}, "seconds must be"),
        ({"seconds": float("nan")}, "seconds must be"),
        ({"compute_device": "mtia"}, "'cpu' or 'cuda'"),
    ],
)
def test_absurd_measurements(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_machine(tmp_path, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this host has none"):
        measure_machine(tmp_path, compute_device="cuda")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    found = measure_machine(tmp_path, seconds=2.0, file_bytes=32 * MIB)
    assert found.compute_device == "cuda"
    assert found.hbm_cap == torch.cuda.mem_get_info()[1]
    # From 50 GB/s to 50 TB/s, and from 1 GB/s to 1 TB/s.
    assert 5e7 < (found.hbm_mem_bw or 0) < 5e10
    assert 1e6 < (found.hbm_to_ddr_mem_bw or 0) < 1e9
    assert torch.cuda.get_device_name() in " ".join(found.notes)
    assert found.topology(1).devices[0].storage.hbm == found.hbm_cap


def test_directories_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="must be a directory"):
        measure_machine(tmp_path / "absent", compute_device="cpu")
    monkeypatch.setattr(disk_module, "free_bytes", lambda _: 31 * MIB)
    with pytest.raises(StoreFullError, match="free some"):
        measure_disk(tmp_path, file_bytes=1 << 30, seconds=0.1)

    def refuse(**_: Any) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(disk_module, "free_bytes", lambda _: 1 << 30)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ReadOnlyStoreError, match="no file can be made"):
        measure_disk(tmp_path, file_bytes=1 << 30, seconds=0.1)


def test_half_of_a_small_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "free_bytes", lambda _: 35 * MIB)
    assert measure_disk(tmp_path, file_bytes=1 << 30, seconds=1.0).file_bytes == 17 * MIB


def test_a_slow_disk_gets_a_smaller_file(tmp_path: Path) -> None:
    assert measure_disk(tmp_path, file_bytes=1 << 40, seconds=0.01).file_bytes == 16 * MIB


def test_without_direct_reads_the_page_cache_is_owned_up_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refuse(file: int, command: int, flags: int = 0) -> Any:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real(file, command, flags)

    monkeypatch.setattr("torchrec_turbossd.planner.disk.fcntl.fcntl", refuse)
    machine = measure_machine(tmp_path, compute_device="cpu", seconds=0.5, file_bytes=32 * MIB)
    assert "may flatter it" in " ".join(machine.notes)
    assert machine.ssd_reads_per_s > 10


def test_every_block_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10 * 4096 + 5))
    with (tmp_path / "f").open("rb") as file:
        assert read_for(60.0, os.getppid(), file.fileno(), 10 * 4096, 4096, iter(range(7))) == 7
        with pytest.raises(OSError, match="less than 4096 bytes"):
            read_for(60.0, os.getppid(), file.fileno(), 11 * 4096, 4096, iter([10]))
        # Whoever asked is gone.
        assert read_for(60.0, -1, file.fileno(), 10 * 4096, 4096, iter(range(7))) == 1


PROGRAM = """
import signal
import sys
from pathlib import Path
from torchrec_turbossd.planner.disk import measure_disk
# Whoever runs the tests in the background may have had it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
print("begun", flush=True)
measure_disk(Path(sys.argv[1]), file_bytes=32 << 20, seconds=600.0)
"""


def runs(pid: int) -> bool:
    """Whether a process is there, and not only waits for its parent to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_it_is_interrupted(tmp_path: Path, end: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"begun\n"
        readers: list[int] = []
        deadline = time.monotonic() + 60
        while not readers and time.monotonic() < deadline:
            time.sleep(0.05)
            readers = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
        assert readers and list(tmp_path.iterdir()) == []
        child.send_signal(end)
        assert child.wait(30) != 0
    deadline = time.monotonic() + 30
    while any(map(runs, readers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, readers)) and list(tmp_path.iterdir()) == []
