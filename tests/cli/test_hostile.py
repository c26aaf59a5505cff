"""Input that is odd, absurd or unusable ends with one line and a status, never with a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import torchrec_turbossd.planner
from tests.cli.files import described, write
from tests.cli.test_app import MODEL, in_a_process, measured, run, script
from tests.rules.tree import ROOT

SMALL = [{"name": "a", "rows": 5000, "dim": 16}, {"name": "b", "rows": 100, "dim": 16}]
LAUGHS = "x0: &a0 [1]\n" + "".join(f"x{n}: &a{n} [{','.join(9 * [f'*a{n - 1}'])}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))
MERGES += "tables: *a39\n"
TABLE = "tables:\n- {name: a, rows: 10, dim: 4}\n"


def small(**more: Any) -> dict[str, Any]:
    """Two tables that fit in memory."""
    return described("cpu", tables=SMALL, **more)


def refused(result: Any, said: str) -> None:
    assert result.exit_code == 2, result.output
    assert said in result.stderr and result.stderr.startswith("error: ") and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "not foreseen" not in result.stderr


def never_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it was planned, or measured, first")

    monkeypatch.setattr("torchrec_turbossd.cli.plan.make_plan", fail)
    monkeypatch.setattr(torchrec_turbossd.planner, "measure_machine", fail)


ARRAYS: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: np.save(path, np.array(["a", "b"])),
    "objects": lambda path: np.save(path, np.array([{}, 1], dtype=object)),
    "floats": lambda path: np.save(path, np.array([1.0, 2.0])),
    "complex": lambda path: np.save(path, np.ones(5000, dtype=np.complex64)),
    "times": lambda path: np.save(path, np.ones(5000, dtype="m8[s]")),
    "truths": lambda path: np.save(path, np.ones(5000, dtype=bool)),
    "cut": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x76\x00{'descr': '<i8', ("),
    "huge": lambda path: path.write_bytes(
        b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999,), }".ljust(118)
    ),
}


@pytest.mark.parametrize("key", ["trace", "counts"])
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_no_use(kind: str, key: str, tmp_path: Path) -> None:
    if (kind, key) == ("floats", "counts"):
        return
    ARRAYS[kind](tmp_path / "x.npy")
    tables = [{**SMALL[0], "access": {key: "x.npy"}}]
    refused(run(write(tmp_path / "plan.yaml", described("cpu", tables=tables))), "x.npy is of no use: ")


def test_archives_of_arrays_are_of_no_use(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(5))
    tables = [{**SMALL[0], "access": {"trace": "x.npz"}}]
    refused(run(write(tmp_path / "plan.yaml", described("cpu", tables=tables))), "it has several arrays")


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<u8", ">u4", ">i8", ">i2"])
def test_traces_of_any_integers(dtype: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(4000).astype(dtype))
    tables = [{**SMALL[0], "access": {"trace": "x.npy"}}]
    result = run(write(tmp_path / "plan.yaml", described("cpu", tables=tables)))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("option", ["--json", "--plot", "--machine"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "wanted the name of a file"),
        ("/", "is a folder"),
        (".", "is a folder"),
        ("no/x", "'no/x' cannot be written: No such file"),
        ("plan.yaml/x", "'plan.yaml/x' cannot be written: Not a directory"),
        ("x" * 256, "cannot be written: "),
        ("a\0b", "cannot be written: "),
    ],
)
def test_outputs_are_tried_first(
    option: str, given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_planned(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "plan.yaml", small())
    refused(run("plan.yaml", "--measure", option, given), said)
    assert os.listdir() == ["plan.yaml"]


def test_an_empty_machine_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never_planned(monkeypatch)
    refused(run(write(tmp_path / "plan.yaml", small()), "--machine", ""), "--machine: got ''")


def test_two_outputs_in_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.yaml", small())
    refused(run(path, "--json", tmp_path / "x", "--plot", tmp_path / "x"), "give each a file of its own")


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.yaml", small())
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    assert run(path, "--json", tmp_path / "link").exit_code == 0
    assert (tmp_path / "link").is_symlink() and "torchrec_turbossd plan" in (tmp_path / "target").read_text()
    os.mkfifo(tmp_path / "fifo")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_text()), daemon=True)
    reader.start()
    assert run(path, "--json", tmp_path / "fifo").exit_code == 0
    reader.join(60)
    assert json.loads(got[0])["version"] == 1 and (tmp_path / "fifo").is_fifo()


def test_the_plan_is_printed_whatever_becomes_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    path = write(tmp_path / "plan.yaml", small())
    result = run(path, "--json", tmp_path / "x.json")
    assert result.exit_code == 2 and "2 tables on 2 ranks" in result.stdout
    assert "x.json' cannot be written: No space left" in result.stderr and os.listdir(tmp_path) == ["plan.yaml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hbm", "1"], "hbm (--hbm): a cpu has none"),
        (["--dram", "1" + 400 * "0"], "--dram: got"),
        (["--dram", "8 EiB"], "--dram: got '8 EiB'"),
        (["--dram", "9000000 TiB"], "below 8 EiB"),
        (["--ranks", "1000000"], "--ranks: got 1000000, wanted a whole number above 0, at most 4,096"),
        (["--ranks", "256"], "256 ranks on one host, which has at most 128"),
        (["--ranks-per-host", "129"], "--ranks-per-host: got 129"),
        (["--batch-size", "1" + 30 * "0"], "--batch-size: got 1000"),
        (["--ssd-reads-per-second", "0"], "--ssd-reads-per-second: got '0'"),
        (["--ssd-bandwidth", "1e-12"], "--ssd-bandwidth: got '1e-12'"),
        (["--model", "tests.cli.files:leave"], "failed: SystemExit: 0"),
        (["--model", "tests.cli.files:leave_with_1"], "failed: SystemExit: 1"),
    ],
)
def test_options_of_no_use(arguments: list[str], said: str, tmp_path: Path) -> None:
    whole = small()
    if "--model" in arguments:
        del whole["tables"]
    refused(run(write(tmp_path / "plan.yaml", whole), *arguments), said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tables:\n- {name: a, rows: 1e30, dim: 4}", "tables[0].rows: got '1e30'"),
        ("tables:\n- {name: a, rows: 5, dim: 1e18}", "tables[0].dim: got '1e18'"),
        ("tables:\n- {name: a, rows: 5, dim: 1e10}", "at most 16,384"),
        ("tables:\n- {name: a, rows: 5, dim: 4, lookups: 1.0e+308}", "tables[0].lookups: got 1e+308"),
        ("tables:\n- {name: a, rows: 5, dim: 4, lookups: [1.0e+308]}", "tables[0].lookups[0]: got 1e+308"),
        ('tables:\n- {name: a, rows: "1,6e6", dim: 4}', "tables[0].rows: got '1,6e6'"),
        ("tables:\n- {name: a, rows: 1M, dim: 4}", "such as 1_000_000 or 1e6"),
        ("tables:\n- {name: a, rows: 5, dim: 4, access: {zipf: 1.0e+300}}", "access.zipf: got 1e+300"),
        (TABLE + "batch_size: !!timestamp x", "batch_size: got 'x'"),
        (TABLE + 'batch_size: !!int ""', "batch_size: got ''"),
        (TABLE + "batch_size: !!bool maybe", "batch_size: got 'maybe'"),
        (TABLE + "batch_size: 0256", "batch_size: got '0256'"),
        (TABLE + "batch_size: 1:30", "batch_size: got '1:30'"),
        (TABLE + "batch_size: 0x10", "batch_size: got '0x10'"),
        (TABLE + f"batch_size: {5000 * '9'}", "batch_size: got '999"),
        (TABLE + "reserve: 0.15", "wanted percent"),
        (TABLE + "topology: {ssd_reads_per_second: 1.0e-300}", "ssd_reads_per_second: got 1e-300, wanted reads"),
        (TABLE + "topology: {ssd_bandwidth: 1.0e-300}", "ssd_bandwidth: got 1e-300, wanted a speed"),
        (TABLE + "topology: {ssd_writes_per_read: 1.0e+308}", "ssd_writes_per_read: got 1e+308"),
        (TABLE + "topology: {ranks: 1e6}", "topology.ranks: got '1e6'"),
        (TABLE + 'machine: "a\\0b"', "machine: got 'a\\x00b'"),
        (TABLE + "optimizer: none", "optimizer: got 'none'"),
        (TABLE + LAUGHS, "more than 500,000 values"),
        (MERGES, "a0: unknown key"),
    ],
)
def test_files_of_no_use(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    refused(run(path), said)


def test_json_files_of_no_use(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for text, said in (
        (f'{{"batch_size": {5000 * "9"}}}', "is no JSON"),
        ('{"tables": [{"name": "\\ud800x", "rows": 5, "dim": 4}]}', "tables[0].name: got '\\ud800x'"),
        ("[" * 100_000, "is no JSON"),
        ('{"batch_size": NaN, "tables": [{"name": "a", "rows": 5, "dim": 4}]}', "batch_size: got nan"),
    ):
        path.write_text(text)
        refused(run(path), said)


def test_reserves_are_percent(tmp_path: Path) -> None:
    for given, share in (("0.5%", 0.005), (15, 0.15), (0, 0.0)):
        result = run(write(tmp_path / "plan.yaml", small(reserve=given)), "--json", "-")
        assert json.loads(result.stdout)["machine"]["reserve"] == pytest.approx(share)


def test_what_was_not_foreseen_is_no_bad_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "plan.yaml", small())
    for error, status in ((RuntimeError("odd\nthings"), 2), (EOFError(), 2), (KeyboardInterrupt(), 130)):

        def fail(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr("torchrec_turbossd.cli.plan.make_plan", fail)
        result = run(path)
        assert result.exit_code == status and result.stdout == "" and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("topology", "arguments", "hosts"),
    [
        ({}, [], (1, 1)),
        ({}, ["--ranks", "1"], (1, 1)),
        ({}, ["--ranks", "4"], "4 ranks on how many hosts? The machine was measured for 1 on a host"),
        ({"ranks": 4}, [], "--ranks-per-host"),
        ({"ranks": 4}, ["--ranks-per-host", "4"], (4, 4)),
        ({"ranks": 4}, ["--ranks-per-host", "1"], (4, 1)),
        ({}, ["--ranks-per-host", "2"], (2, 2)),
        ({"device": "cuda", "hbm": 1}, [], "device 'cuda' was said of a machine that was measured as 'cpu'"),
        ({"hbm": 1}, [], "a cpu has none"),
    ],
)
def test_hosts_are_never_multiplied_in_silence(
    topology: dict[str, Any], arguments: list[str], hosts: tuple[int, int] | str, tmp_path: Path
) -> None:
    measured().save(tmp_path / "machine.json")
    path = write(tmp_path / "plan.yaml", described("cpu", tables=SMALL[:1], topology=topology))
    result = run(path, "--machine", tmp_path / "machine.json", "--json", "-", *arguments)
    if isinstance(hosts, str):
        refused(result, hosts)
        return
    machine = json.loads(result.stdout)["machine"]
    assert (machine["ranks"], machine["ranks_per_host"]) == hosts
    # A host has what was measured, however many ranks share it.
    assert machine["dram_bytes"] == (32 << 20) // hosts[1]
    assert machine["ssd_reads_per_second"] == pytest.approx(100_000 / hosts[1])


def test_a_device_that_options_change_has_no_hbm(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.yaml", described("cuda", tables=SMALL, fast="64 MiB"))
    result = run(path, "--device", "cpu", "--json", "-")
    assert result.exit_code == 0 and json.loads(result.stdout)["machine"]["hbm_bytes"] == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_row_stores_that_do_not_fit_are_said_aloud(device: str, tmp_path: Path) -> None:
    table = {"name": "a", "rows": 4_000_000, "dim": 64, "constraints": {"compute_kernels": "key_value"}}
    whole = described(device, fast="200 MiB", tables=[table])
    whole["topology"]["dram"] = "200 MiB"
    path = write(tmp_path / "plan.yaml", whole)
    result = run(path, "--json", "-")
    report = json.loads(result.stdout)
    rank = report["ranks"][0]
    used = rank["dram_used_bytes"] if device == "cuda" else rank["fast_used_bytes"]
    assert rank["dram_short_bytes"] == rank["store_bytes"] + used - (200 << 20) > 0
    assert result.stderr == f"Warning: {report['warnings'][0]}\n" and "DRAM is short by" in result.stderr
    text = run(path)
    assert text.exit_code == 0 and f"Warning: {report['warnings'][0]}" in " ".join(text.stdout.split())
    # What it says to do helps.
    whole["topology"]["dram"] = "4 GiB"
    report = json.loads(run(write(path, whole), "--json", "-").stdout)
    if device == "cpu":
        assert report["warnings"] == []
        whole |= {"reserve": 0, "tables": [{**table, "rows": 40_000_000}]}
        (warning,) = json.loads(run(write(path, whole), "--json", "-").stdout)["warnings"]
        whole["reserve"] = int(warning.rpartition("reserve: ")[2].rstrip("."))
        report = json.loads(run(write(path, whole), "--json", "-").stdout)
    assert report["warnings"] == [] and not any(rank["dram_short_bytes"] for rank in report["ranks"])


def test_what_cannot_be_trained_is_not_planned(tmp_path: Path) -> None:
    whole = described("cpu", optimizer="adam")
    refused(run(write(tmp_path / "plan.yaml", whole)), "optimizer ADAM is not supported on SSD-backed tables on cpu")
    assert run(write(tmp_path / "plan.yaml", small(optimizer="adam"))).exit_code == 0


def test_constraints_that_leave_no_way_are_named(tmp_path: Path) -> None:
    limits = {"compute_kernels": "key_value", "sharding_types": "data_parallel"}
    tables = [{**SMALL[0], "constraints": limits}]
    path = write(tmp_path / "plan.yaml", described("cpu", tables=tables))
    refused(run(path), "plan.yaml:1: tables[0]: no way to hold 'a' goes with its constraints")


def test_what_would_do_is_said_in_words_of_the_command(tmp_path: Path) -> None:
    result = run(write(tmp_path / "plan.yaml", described("cuda")), "--hbm", "1 MiB")
    assert result.exit_code == 1 and "raise hbm (--hbm) or add ranks (--ranks)" in result.stderr
    assert "Topology" not in result.stderr and "pooling_factors" not in result.stderr


def test_copies_on_every_gpu_are_in_hbm(tmp_path: Path) -> None:
    tables = [{**SMALL[1], "constraints": {"sharding_types": "data_parallel"}}]
    report = json.loads(run(write(tmp_path / "plan.yaml", described("cuda", tables=tables)), "--json", "-").stdout)
    assert report["tables"][0]["tier"] == "HBM"


def test_options_alone_are_enough(tmp_path: Path) -> None:
    host = ("--device", "cpu", "--ranks", 1, "--dram", "1 GiB", "--ssd", "1 GiB", "--batch-size", 64)
    result = run("--model", MODEL, *host)
    refused(result, "the options: topology: ssd_reads_per_second")
    result = run("--model", MODEL, *host, "--ssd-reads-per-second", "1e5", "--ssd-bandwidth", "2 GB/s", "--json", "-")
    machine = json.loads(result.stdout)["machine"]
    assert (machine["ssd_reads_per_second"], machine["ssd_bandwidth"]) == (1e5, 2e9)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("plan plan.yaml | true", 141),
        ("plan plan.yaml --json - >&-", 2),
        ("plan plan.yaml >&-", 2),
        ("plan plan.yaml > /dev/full", 2),
        ("plan plan.yaml --json - > /dev/full", 2),
        ("plan odd.yaml", 0),
    ],
)
def test_ends_of_pipes(line: str, status: int, tmp_path: Path) -> None:
    write(tmp_path / "plan.yaml", small())
    write(tmp_path / "odd.yaml", described("cpu", tables=[{**SMALL[0], "name": "bé表"}]))
    (tmp_path / "main.py").write_text(script())
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "ascii"}
    command = f"set -o pipefail; {sys.executable} -W ignore main.py {line}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert status != 0 or "b\\xe9\\u8868" in done.stdout


def test_help_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys\nfrom torchrec_turbossd.cli.app import app\napp(['plan', '--help'], standalone_mode=False)\n"
    done = in_a_process(tmp_path, code + "print({'torch', 'numpy'} & set(sys.modules))")
    assert done.returncode == 0 and done.stdout.endswith("set()\n"), done.stderr
