"""The DLRM example trains, compares, resumes and reads Criteo's format, and its day is as skewed as it says."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchrec_turbossd.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
PNG = b"\x89PNG"
LINES = 300
SMALL = ["--batch-size", "32", "--dim", "64", "--budget-mb", "1", "--evaluations", "2"]
STEPS, HALF = 60, 30
"""Steps of a quick run, and of half of one."""


@pytest.fixture(scope="module", autouse=True)
def examples() -> Iterator[None]:
    """The example's modules can be imported by their names, as the example itself does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    # On the CPU, where numbers are equal bit for bit, whatever the machine has.
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=240)


def succeeded(done: subprocess.CompletedProcess[str], out: Path) -> dict[str, Any]:
    """The figures that a run left in `out`."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(out.glob("run-*")), "scratch files are left behind"
    assert (out / "dlrm.png").read_bytes().startswith(PNG)
    figures: dict[str, Any] = json.loads((out / "summary.json").read_text())
    assert figures["held"]
    return figures


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Figures and output of a quick run."""
    out = tmp_path_factory.mktemp("quick")
    done = run(str(EXAMPLES / "train_dlrm.py"), "--quick", "--out", str(out))
    return succeeded(done, out), done.stdout


@pytest.mark.slow
def test_quick_run(quick: tuple[dict[str, Any], str]) -> None:
    figures, said = quick
    assert figures["loss_difference"] == 0
    assert len(figures["losses"]["ssd"]) == STEPS
    assert figures["losses"]["ssd"] == figures["losses"]["memory"]
    assert figures["auc"]["ssd"] == figures["auc"]["memory"]
    (start, before), *_, (_, after) = figures["auc"]["ssd"]
    assert start == 0 and 0.4 < before < 0.6 and after > 0.68
    assert figures["table_bytes"]["ssd"] < 0.3 * figures["table_bytes"]["memory"]
    assert figures["hit_rates"]
    assert all(0.3 < rate["all"] < 0.95 for rate in figures["hit_rates"].values())
    assert all(f"\n{table} " in said and f"\n│ {table} " in said for table in figures["hit_rates"]), (
        "plan and hit rates"
    )
    last = said.rstrip().rpartition("\n")[2]
    assert last.startswith("On SSD against all in memory: losses differ by 0; AUC 0.7")
    assert " ms (" in last and "MiB of memory (" in last


@pytest.mark.gpu
@pytest.mark.slow
def test_quick_run_on_cuda(tmp_path: Path) -> None:
    given = ["--quick", "--ranks", "1", "--budget-mb", "8", "--out", str(tmp_path)]
    done = run(str(EXAMPLES / "train_dlrm.py"), *given, CUDA_VISIBLE_DEVICES="0")
    figures = succeeded(done, tmp_path)
    assert figures["device"] == "cuda" and figures["hit_rates"]
    assert figures["loss_difference"] < 1e-3
    assert figures["auc"]["ssd"][-1][1] > 0.65


# Each is a run of one rank, as a launcher would start it; one after the other in one process, to import but once.
RUNS = """
import json, sys, train_dlrm
given, statuses = json.loads(sys.argv[1])
sys.exit([train_dlrm.main(arguments) for arguments in given] != statuses)
"""


def launched(runs: list[list[str]], statuses: list[int]) -> subprocess.CompletedProcess[str]:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = str(found.getsockname()[1])
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": port}
    return run("-c", RUNS, json.dumps([runs, statuses]), MASTER_ADDR="localhost", **environment)


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    common = ["--quick", "--batch-size", "128", "--samples", "4096", "--evaluations", "1"]
    resume = ["--out", str(second), "--resume", str(first / "checkpoint-1920")]
    done = launched(
        [
            [*common, "--budget-mb", "5", "--no-compare", "--out", str(whole)],
            [*common, "--budget-mb", "5", "--no-compare", "--out", str(first), "--steps", "15"],
            # With another plan, and against tables in memory that go on from there too.
            [*common, "--budget-mb", "4", *resume],
            [*common, "--budget-mb", "4", *resume, "--seed", "1"],
        ],
        [0, 0, 0, 1],
    )
    figures = [succeeded(done, out) for out in (whole, first, second)]
    losses = [found["losses"]["ssd"] for found in figures]
    assert [len(each) for each in losses] == [30, 15, 15]
    assert losses[1] + losses[2] == losses[0]
    assert figures[2]["loss_difference"] == 0
    assert figures[2]["auc"]["ssd"][0] == figures[1]["auc"]["ssd"][-1]
    assert figures[2]["auc"]["ssd"][-1] == figures[0]["auc"]["ssd"][-1]
    assert figures[2]["table_bytes"]["ssd"] < figures[0]["table_bytes"]["ssd"]
    assert "its seed: 0, here: 1" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """A log in Criteo's format: some fields empty, some numbers negative, some values in capitals."""
    chance = random.Random(0)
    found = []
    for _ in range(LINES):
        integers = [chance.choice(["", "-2", str(chance.randrange(10 ** chance.randint(1, 8)))]) for _ in range(13)]
        values = [chance.choice(["", f"{chance.randrange(50):08x}", f"{chance.getrandbits(32):X}"]) for _ in range(26)]
        found.append("\t".join([str(chance.randrange(2)), *integers, *values]) + "\n")
    return found


@pytest.mark.slow
def test_a_compressed_log_trains_under_torchrun(tmp_path: Path, lines: list[str]) -> None:
    log, out, ssd = tmp_path / "log.gz", tmp_path / "out", tmp_path / "ssd"
    log.write_bytes(gzip.compress("".join(lines).encode()))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    given = ["--criteo", str(log), "--out", str(out), "--ssd-directory", str(ssd), *SMALL]
    done = run(*launcher, str(EXAMPLES / "train_dlrm.py"), *given)
    figures = succeeded(done, out)
    assert not list(ssd.iterdir()), "live tables are left behind"
    assert figures["data"] == f"the first {LINES} lines of log.gz"
    assert figures["ranks"] == 2 and len(figures["losses"]["ssd"]) == (LINES - LINES // 16) // 64
    assert figures["hit_rates"] and figures["loss_difference"] == 0


def expected(line: str, rows: tuple[int, ...]) -> tuple[int, list[float], list[int]]:
    """Label, dense features and ids of a line, by Python's own means."""
    label, *fields = line.rstrip("\n").split("\t")
    dense = [np.log1p(max(int(field or 0), 0)) for field in fields[:13]]
    values = [int(field or "0", 16) for field in fields[13:]]
    return int(label), dense, [1 + v % (n - 1) if v else 0 for v, n in zip(values, rows, strict=True)]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("compress", [False, True])
def test_criteo_lines_are_read(
    tmp_path: Path, lines: list[str], compress: bool, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dlrm_criteo
    from dlrm_day import Day

    # Many blocks, whose ends fall inside of lines.
    monkeypatch.setattr(dlrm_criteo, "_BLOCK_BYTES", 777)
    text = "".join(lines).rstrip("\n").replace("\n", ending).encode()
    (tmp_path / "log").write_bytes(gzip.compress(text) if compress else text)
    # All lines, the last one without its end, or not all of them.
    wanted = lines[:-3] if compress else lines
    dlrm_criteo.read_criteo(tmp_path / "log", tmp_path / "day", len(wanted), (100,) * 25 + (10**6,))
    day = Day.map(tmp_path / "day")
    assert len(day) == len(wanted)
    last = {line.rstrip("\n").split("\t")[-1] for line in wanted}
    occurring = len({int(value or "0", 16) for value in last})
    assert day.rows == (100,) * 25 + (dlrm_criteo.ROOM * occurring,)
    for place, line in enumerate(wanted):
        label, dense, ids = expected(line, day.rows)
        assert day.labels[place] == label
        np.testing.assert_allclose(day.dense[place], dense, rtol=1e-6)
        assert day.ids[place].tolist() == ids
    batch = day.batch(7, 5)
    assert batch.sparse_features["C26"].values().tolist() == day.ids[7:12, 25].tolist()
    assert batch.labels.tolist() == day.labels[7:12].tolist()


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        (0, "2", "line 3, field 1: wanted a label of 0 or 1, got '2'"),
        (0, "", "line 3, field 1: wanted a label of 0 or 1, got ''"),
        (5, "1.5", "line 3, field 6: wanted an integer or nothing, got '1.5'"),
        (5, "-", "line 3, field 6: wanted an integer"),
        (39, "12x", "line 3, field 40: wanted at most 8 hexadecimal digits, got '12x'"),
        (20, "123456789", "line 3, field 21: wanted at most 8 hexadecimal digits"),
        (20, "a\tb", "line 3: wanted 40 fields between tabs .* got 41"),
        (39, None, "line 3: wanted 40 fields .* got 39"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, lines: list[str], field: int, text: str | None, message: str) -> None:
    from dlrm_criteo import read_criteo

    fields: list[str | None] = [*lines[2].rstrip("\n").split("\t")]
    fields[field] = text
    wrong = "\t".join(f for f in fields if f is not None) + "\n"
    (tmp_path / "log").write_text("".join([*lines[:2], wrong, *lines[3:]]))
    with pytest.raises(InputError, match=message):
        read_criteo(tmp_path / "log", tmp_path / "day", LINES, (100,) * 26)


def test_a_file_that_breaks_off_or_is_empty_is_refused(tmp_path: Path, lines: list[str]) -> None:
    from dlrm_criteo import read_criteo

    whole = gzip.compress("".join(lines).encode())
    for content, message in ((whole[: len(whole) // 2], "breaks off"), (b"", "has no lines")):
        (tmp_path / "log").write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_criteo(tmp_path / "log", tmp_path / message.replace(" ", "-"), LINES, (100,) * 26)


@pytest.mark.slow
def test_a_generated_day_is_reused_as_real_tables_are(tmp_path: Path) -> None:
    from dlrm_day import Day
    from dlrm_generate import generate_day
    from dlrm_popularity import MEAN_REUSE, Reuse

    samples = 1 << 20
    generate_day(tmp_path / "day", samples, (1_000_000,) * 26, seed=0)
    day = Day.map(tmp_path / "day")
    assert len(day) == samples and len(day.unfolded) == 6
    counts = np.concatenate([np.bincount(day.ids[:, column]) for column in day.unfolded])
    rows, lookups = Reuse.of(counts).distance(Reuse.calibrated())
    assert rows < 0.005, "what the docstring says: 0.3 %"
    assert lookups < 0.02, "what the docstring says: about 1 %"
    assert 6 * samples / np.count_nonzero(counts) == pytest.approx(MEAN_REUSE, rel=0.03)
    assert 0.25 < day.labels.mean() < 0.27


def test_reuse_is_told_by_hand() -> None:
    from dlrm_popularity import Reuse

    found = Reuse.of(np.array([1, 0, 1, 2, 4, 40_000]))
    assert found.rows.tolist() == [0.4, 0.2, 0.2, *13 * [0.0], 0.2]
    assert found.lookups[[0, 1, 2, 16]].tolist() == [n / 40_008 for n in (2, 2, 4, 40_000)]
    other = Reuse.of(np.array([1, 1, 2, 2, 40_000]))
    assert found.distance(other) == pytest.approx((0.2, 4 / 40_008), abs=1e-4)


def test_a_day_is_a_stream_and_a_function_of_its_arguments(tmp_path: Path) -> None:
    from dlrm_day import Day
    from dlrm_generate import CARDINALITIES, generate_day

    samples = 1 << 14
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        generate_day(tmp_path / name, samples, (10_000,) * 26, seed)
    one, same, other = (Day.map(tmp_path / name) for name in ("one", "same", "other"))
    assert one.rows == tuple(min(10_000, values) for values in CARDINALITIES)
    for part in ("dense", "ids", "labels"):
        assert (getattr(one, part) == getattr(same, part)).all()
        assert (getattr(one, part) != getattr(other, part)).any()
    assert all(one.ids[:, c].min() >= 0 and one.ids[:, c].max() < one.rows[c] for c in range(26))
    # Rows asked for twice: how far apart, in days. Were the order a matter of chance, 19 % would be within a tenth.
    ids = one.ids[:, 2]
    twice = np.flatnonzero(np.bincount(ids) == 2)
    order = np.argsort(ids, kind="stable")
    places = order[np.isin(ids[order], twice)].reshape(-1, 2)
    near = np.abs(np.diff(places, axis=1)) < samples / 10
    assert 0.45 < near.mean() < 0.65


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rows", "1"], "must be 2 or more"),
        (["--rows", "5,6"], "one number for all tables, or 26; got 2"),
        (["--rows", "many"], "must be a whole number"),
        (["--dim", "6"], "must be a multiple of 4"),
        (["--batch-size", "0"], "must be 1 or more"),
        (["--samples", "1000"], "a step takes 2048"),
        (["--criteo", "no/such/file"], "no such file"),
        (["--resume", "no/such/folder"], "no such folder"),
        (["--out", __file__], "not a folder"),
        (["--evaluations", "-1"], "must be 1 or more"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from dlrm_settings import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(given)
    assert message in capsys.readouterr().err


def test_quick_changes_only_what_is_not_given() -> None:
    from dlrm_settings import DEFAULTS, QUICK, parse_arguments

    found = parse_arguments(["--quick", "--budget-mb", "9", "--rows", ",".join(map(str, range(2, 28)))])
    assert (found.budget_mb, found.samples, found.ranks) == (9, QUICK["samples"], 2)
    assert found.most_rows == tuple(range(2, 28))
    assert parse_arguments([]).most_rows == DEFAULTS["rows"] * 26


@pytest.mark.parametrize(
    ("samples", "done", "given"), [(32_768, 0, []), (10_000, 1_000, []), (10_000, 999, ["--steps", "17"])]
)
def test_what_is_held_out_comes_last_and_nothing_is_learnt_from_twice(
    samples: int, done: int, given: list[str]
) -> None:
    from dlrm_settings import parse_arguments
    from dlrm_training import Schedule

    settings = parse_arguments(["--batch-size", "100", "--ranks", "3", *given])
    schedule = Schedule.of(settings, samples, done)
    first, each = schedule.held_out
    assert samples // 20 < 3 * each == samples - first < samples // 12
    starts = [start for phase in schedule.phases(4) for start in phase]
    assert starts == list(range(done, schedule.stop, 300)) and schedule.steps == len(starts)
    most = 17 * 300 if given else first
    assert most - 300 < schedule.stop <= most
    assert len(schedule.phases(4)) == 4 and len(schedule.phases(1000)) == schedule.steps
