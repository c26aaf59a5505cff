"""The command itself: text, files, options and exit statuses."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import torchrec_turbossd.planner
from tests.cli.files import TABLES, described, write
from tests.rules.tree import ROOT
from torchrec_turbossd.cli.app import app
from torchrec_turbossd.cli.report import PlanReport, load_report
from torchrec_turbossd.planner import Machine
from torchrec_turbossd.sizing import AccessProfile

DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"])
MODEL = "tests.cli.files:make_model"


def run(*arguments: object, width: int | None = None) -> Any:
    env = {"COLUMNS": None if width is None else str(width)}
    return CliRunner(env=env).invoke(app, ["plan", *map(str, arguments)])


def report_of(*arguments: object, folder: Path) -> PlanReport:
    path = folder / "report.json"
    result = run(*arguments, "--json", path)
    assert result.exit_code == 0, result.output
    return load_report(path)


@DEVICES
def test_text_says_what_goes_where(device: str, tmp_path: Path) -> None:
    result = run(write(tmp_path / "plan.yaml", described(device)))
    assert result.exit_code == 0 and result.stderr == ""
    memory = "HBM" if device == "cuda" else "DRAM"
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert "SSD" in lines["big"] and f"  {memory}  " in lines["tiny"] and "all" in lines["tiny"]
    assert "5 tables on 2 ranks on 1 host" in result.stdout and "exact_row_wise_adagrad" in result.stdout
    text = " ".join(result.stdout.split())
    assert "On SSD, because least asked for by byte; lookups of a step for each MiB of all their rows: big" in text
    assert f"One more GiB of {memory} on each rank" in text
    assert result.stdout.isascii() and "\x1b" not in result.stdout


@DEVICES
def test_text_and_json_agree(device: str, tmp_path: Path) -> None:
    path = write(tmp_path / "plan.yaml", described(device))
    result = run(path, "--json", "-")
    assert result.exit_code == 0
    whole = json.loads(result.stdout)
    assert (whole["format"], whole["version"]) == ("torchrec_turbossd plan", 1)
    text = run(path).stdout
    assert f"{whole['hit_rate']:.2%} of" in text
    lines = [line.split() for line in text.splitlines() if line]
    for table in whole["tables"]:
        (line,) = [words for words in lines if words[0] == table["name"] and len(words) > 12]
        assert f"{table['hit_rate']:.2%}" in line and f"{table['slot_share']:.1%}" in line and table["tier"] in line


def test_pictures_are_pictures(tmp_path: Path) -> None:
    tables = [
        {
            "name": f"_t{n}$",
            "rows": 1000,
            "dim": 64,
            "lookups": n + 1,
            "constraints": {"compute_kernels": "key_value"},
        }
        for n in range(14)
    ]
    path, png = write(tmp_path / "plan.yaml", described("cpu", tables=tables)), tmp_path / "p.png"
    result = run(path, "--plot", png)
    assert result.exit_code == 0 and "Drew 12 hit-rate curves" in result.stdout
    assert png.read_bytes().startswith(b"\x89PNG\r\n") and png.stat().st_size > 10_000
    result = run(write(tmp_path / "plan.yaml", described("cpu", tables=[TABLES[4]])), "--plot", png)
    assert result.exit_code == 0 and "no table is on SSD" in result.stderr and "1 table on 2 ranks" in result.stdout
    result = run(write(tmp_path / "plan.yaml", described("cpu")), "--plot", tmp_path / "no" / "p.png")
    assert result.exit_code == 2 and "cannot be written" in result.stderr


def test_options_come_before_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.yaml", described("cpu"))
    AccessProfile.zipf(400_000, 1.5).save(tmp_path / "big.json")
    report = report_of(
        *(path, "--device", "cuda", "--ranks", 4, "--ranks-per-host", 2, "--hbm", "40 MiB", "--dram", "2 GB"),
        *("--ssd", "20 GiB", "--batch-size", 64, "--profile", f"big={tmp_path / 'big.json'}"),
        folder=tmp_path,
    )
    machine = report.machine
    assert (machine.device, machine.ranks, machine.ranks_per_host, report.batch_size) == ("cuda", 4, 2, 64)
    assert (machine.hbm_bytes, machine.dram_bytes, machine.ssd_bytes) == (40 << 20, 2 * 10**9, 20 << 30)
    assert report.tables[0].access.startswith("profile") and report.tables[0].tier == "SSD"


def test_a_model_needs_no_file(tmp_path: Path) -> None:
    host = ("--device", "cpu", "--ranks", 1, "--dram", "32 MiB", "--ssd", "1 GiB", "--batch-size", 64)
    result = run("--model", MODEL, *host)
    assert result.exit_code == 2 and "ssd_reads_per_second" in result.stderr
    machine = tmp_path / "machine.json"
    measured().save(machine)
    report = report_of("--model", MODEL, *host, "--machine", machine, folder=tmp_path)
    assert {t.name: t.tier for t in report.tables} == {"big": "SSD", "tiny": "DRAM", "events": "DRAM"}
    file = write(tmp_path / "more.yaml", {"machine": "machine.json", "tables": [{"name": "big", "lookups": 9}]})
    assert report_of(file, "--model", MODEL, *host, folder=tmp_path).tables[0].lookups == 9 * 2 * 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to plan"),
        (["no.yaml"], "no.yaml cannot be read: No such file"),
        (["--model", "tests.cli.files"], "wanted package.module:factory"),
        (["--model", "tests.cli.nothing:x"], "failed: ModuleNotFoundError"),
        (["--model", "tests.cli.files:missing"], "failed: AttributeError"),
        (["--model", "tests.cli.files:TABLES"], "is no function, but list"),
        (["--model", "tests.cli.files:make_nothing"], "returned str, wanted an nn.Module"),
        (["--model", "tests.cli.files:fail"], "failed: RuntimeError: no luck"),
        (["plan.yaml", "--hbm", "much"], "--hbm: got 'much', wanted a size"),
        (["plan.yaml", "--device", "tpu"], "--device: got 'tpu', wanted one of cpu, cuda"),
        (["plan.yaml", "--profile", "big"], "--profile: got 'big', wanted TABLE=PATH"),
        (["plan.yaml", "--profile", "huge=x"], "--profile: there is no table 'huge'; there are big, wide"),
        (["plan.yaml", "--profile", "big=x"], "--profile: x cannot be read"),
        (["plan.yaml", "--machine", "no.json"], "no.json: No such file"),
        (["plan.yaml", "--machine", "plan.yaml"], "is not a torchrec_turbossd machine"),
        (["plan.yaml", "--json", "no/x.json"], "No such file"),
        (["--measure", "--plot", "x.png"], "are about a plan"),
        (["plan.yaml", "--ranks", "0"], "--ranks"),
    ],
)
def test_wrong_input_is_status_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "plan.yaml", described("cpu"))
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2 and said in result.stderr and result.stdout == ""
    assert "Traceback" not in result.stderr and not list(tmp_path.glob("*.tmp"))


def test_what_does_not_fit_is_status_1(tmp_path: Path) -> None:
    result = run(write(tmp_path / "plan.yaml", described("cuda")), "--hbm", "1 MiB")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: no plan fits. HBM: the tables take at least")


def measured() -> Machine:
    return Machine(
        compute_device="cpu",
        local_world_size=1,
        hbm_cap=0,
        ddr_cap=32 << 20,
        ssd_cap=1 << 30,
        ssd_reads_per_s=100_000,
        ssd_bytes_per_s=1e9,
        notes=("DRAM: as a test says",),
    )


def test_what_is_measured_is_written_and_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def measure(directory: Path, **how: Any) -> Machine:
        asked.append((directory, how))
        return measured()

    monkeypatch.setattr(torchrec_turbossd.planner, "measure_machine", measure)
    monkeypatch.chdir(tmp_path)
    result = run("--measure", "--ssd-directory", "/disk", "--device", "cpu")
    assert result.exit_code == 0 and "DRAM: as a test says" in result.stdout
    assert Machine.load("machine.json") == measured()
    path = write(tmp_path / "plan.yaml", described("cpu", topology={}))
    report = report_of(path, "--measure", "--machine", "other.json", folder=tmp_path)
    assert report.machine.dram_bytes == 32 << 20 and report.machine.notes == ["DRAM: as a test says"]
    assert Machine.load("other.json") == measured()
    assert [how for _, how in asked] == [
        {"compute_device": "cpu", "local_world_size": None},
        {"compute_device": None, "local_world_size": None},
    ]
    assert str(asked[0][0]) == "/disk"


def test_many_tables_and_ranks_fit_any_width(tmp_path: Path) -> None:
    tables = [{**TABLES[4], "name": f"table_of_a_long_name_{n}"} for n in range(30)]
    path = write(tmp_path / "plan.yaml", described("cpu", ranks=4, tables=[TABLES[0], *tables]))
    narrow = run(path, "--top", 3, width=60).stdout
    assert max(map(len, narrow.splitlines())) <= 60 and "no room for" in narrow
    assert "and 28 tables with less time" in narrow and "and 1 rank with less time" in narrow
    shown = [line for line in narrow.splitlines() if line.startswith(("table_of", "big "))]
    assert len(shown) == 3
    whole = run(path, "--all").stdout
    assert sum(line.startswith("table_of") for line in whole.splitlines()) == 30 and "no room for" not in whole


def test_help_and_version() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", "--help"])
    assert result.exit_code == 0 and "--ssd-directory" in result.stdout and "Exit" not in result.stderr
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout == f"torchrec_turbossd {torchrec_turbossd.__version__}\n"


def test_the_example_and_the_readme_are_one() -> None:
    result = run(ROOT / "examples" / "plan.yaml")
    assert result.exit_code == 0
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [part.split("```")[0] for part in readme.split("```yaml\n")[1:]]
    shown, file = yaml.safe_load(block), yaml.safe_load((ROOT / "examples" / "plan.yaml").read_text())
    assert shown == file
    (printed,) = [part.split("```")[0] for part in readme.split("```text\n4 tables on ")[1:]]
    # Figures follow the planner; what is said in which order does not.
    heads = [[line.split()[0] for line in text.splitlines() if "  " in line] for text in (result.stdout, printed)]
    assert heads[0] == heads[1] and {"rank", "table", "products", "users"} <= set(heads[0])


def script() -> str:
    """What pip makes of the entry point."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    name, target = config["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, function = target.split(":")
    assert name == "torchrec-turbossd"
    return f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n"


def in_a_process(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_the_script_runs(tmp_path: Path) -> None:
    write(tmp_path / "plan.yaml", described("cpu"))
    (tmp_path / "mine.py").write_text("from tests.cli.files import make_model\n")
    arguments = ["plan", "plan.yaml", "--json", "-"]
    done = in_a_process(tmp_path, script(), *arguments)
    assert done.returncode == 0 and done.stderr.startswith("Warning: DRAM is short by"), done.stderr
    assert done.stderr.count("\n") == 1
    assert json.loads(done.stdout)["tables"][0]["name"] == "big"


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    hidden = "import importlib.util as u\nfind = u.find_spec\n"
    hidden += "u.find_spec = lambda name, *a: None if name in ('typer', 'yaml') else find(name, *a)\n"
    done = in_a_process(tmp_path, hidden + script(), "plan")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == 'torchrec-turbossd needs typer, yaml: pip install "torchrec_turbossd[cli]"\n'


def test_the_package_imports_none_of_it(tmp_path: Path) -> None:
    code = "import sys, torchrec_turbossd, torchrec_turbossd.cli\n"
    code += "print(sorted({'typer', 'rich', 'yaml', 'matplotlib', 'torch'} & set(sys.modules)))"
    assert in_a_process(tmp_path, code).stdout == "[]\n"
