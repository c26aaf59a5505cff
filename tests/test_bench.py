"""The benchmark runs, says what it measured on what and against whom, and keeps what went wrong."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import memory_group, run, tools
from benchmarks.context import Context
from benchmarks.figures import Figure, Goal, SkipRow, number
from benchmarks.readers import read_during, read_once
from benchmarks.streams import Zipf, drifting, read_trace
from benchmarks.timing import interleave, percentiles

ROOT = Path(__file__).resolve().parents[1]
AT_MOST, AT_LEAST = Goal(at_most=True, reach=1.35), Goal(at_most=False, reach=0.9)


def measure(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--label", "here", "--out", str(folder / "out")]
    command += ["--directory", str(folder / "data"), *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def results(folder: Path) -> dict[str, Any]:
    (file,) = (folder / "out").glob("*.json")
    whole: dict[str, Any] = json.loads(file.read_text())
    return whole


def test_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("".join(f"user {i * i % 2017}\n" for i in range(4000)))
    done = measure(tmp_path, "--only", "lookup", "policies", "bulk-load", "--trace", str(trace), PATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path)
    assert found["quick"] and found["label"] == "here"
    assert found["machine"]["cores"] and found["machine"]["cpu"] and found["machine"]["disk"]
    assert {"python", "torch", "rocksdict"} <= set(found["versions"])
    figures = found["figures"]
    looked_up = [f for f in figures if f["row"] == "lookup"]
    assert len(looked_up) == 4
    for figure in looked_up:
        assert figure["ours"] > 0 and figure["theirs"] > 0
        assert figure["ratio"] == pytest.approx(figure["ours"] / figure["theirs"])
        assert figure["verdict"] == ("pass" if figure["ratio"] <= 1.35 else "FAIL")
    hit = [f for f in figures if f["row"] == "policies"]
    assert len(hit) == 4 * 5 and sum("trace.txt" in f["case"] for f in hit) == 4
    assert all(0 < f["ours"] < 1 and f["peer"] == "lru" for f in hit)
    (loaded,) = (f for f in figures if f["row"] == "bulk-load")
    assert loaded["verdict"] == "skipped" and "apt-get install rocksdb-tools" in loaded["skipped"]
    assert sum(found["counts"].values()) == len(figures)
    page = next((tmp_path / "out").glob("*-here-cpu.md")).read_text()
    assert all(f"## {row}" in page for row in ("lookup", "policies", "bulk-load")) and "apt-get" in page
    assert not list((tmp_path / "data").iterdir()), "data files are left behind"


def test_a_row_that_raises_is_kept_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(context: Context) -> Iterator[Figure]:
        yield Figure(row="broken", case="first", ours=3.0, theirs=2.0, goal=AT_MOST)
        raise ValueError("out of luck")

    def missing(context: Context) -> Iterator[Figure]:
        raise SkipRow("no such tool")
        yield

    def works(context: Context) -> Iterator[Figure]:
        yield Figure(row="works", case="all", ours=1.0, theirs=2.0, goal=AT_MOST)

    rows = {"broken": run.Row("b", broken), "missing": run.Row("m", missing), "works": run.Row("w", works)}
    monkeypatch.setattr(run, "ROWS", rows)
    for _ in range(2):
        assert run.main(["--out", str(tmp_path), "--directory", str(tmp_path / "data"), "--label", "x"]) == 1
    first, second = sorted(tmp_path.glob("*.json"), key=lambda f: len(f.name))
    assert second.name == first.name.replace(".json", "-2.json"), "a second run must not overwrite the first"
    found = json.loads(first.read_text())
    assert [f["verdict"] for f in found["figures"]] == ["FAIL", "error", "skipped", "pass"]
    assert "out of luck" in found["figures"][1]["error"] and found["figures"][2]["skipped"] == "no such tool"


@pytest.mark.parametrize(
    ("goal", "ours", "theirs", "failures", "held"),
    [
        (AT_MOST, 1.35, 1.0, 0, True),
        (AT_MOST, 1.36, 1.0, 0, False),
        (AT_LEAST, 0.9, 1.0, 0, True),
        (AT_LEAST, 0.89, 1.0, 0, False),
        (AT_MOST, 1.0, 1.0, 1, False),
        (AT_MOST, 1.0, 0.0, 0, None),
        (AT_MOST, None, 1.0, 0, None),
        (None, 1.0, 1.0, 0, None),
    ],
)
def test_goals(goal: Goal | None, ours: float | None, theirs: float, failures: int, held: bool | None) -> None:
    assert Figure(row="r", case="c", ours=ours, theirs=theirs, goal=goal, failures=failures).held is held


def test_rounds_alternate_and_disturbances_cancel() -> None:
    order: list[str] = []
    slow = iter([1, 1, 5, 5, 9, 1])

    def of(name: str, seconds: float) -> float:
        order.append(name)
        return seconds * next(slow)

    pair = interleave(lambda: of("ours", 3.0), lambda: of("theirs", 2.0), 3)
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert pair.ratio == pytest.approx(1.5) and pair.our_median / pair.their_median == pytest.approx(1.5)


def test_readers_note_every_lookup_and_every_failure() -> None:
    batches, offsets = [torch.tensor([i]) for i in range(20)], torch.tensor([0, 1])
    seen: list[int] = []

    def look_up(ids: torch.Tensor, _: torch.Tensor) -> None:
        if ids.item() == 7:
            raise ValueError("unlucky")
        seen.append(int(ids))

    taken = read_once(look_up, batches, offsets, 3, 60.0)
    assert sorted(seen) == [i for i in range(20) if i != 7]
    assert taken.seconds.size == 19 and len(taken.failures) == 1 and "unlucky" in taken.failures[0]
    assert read_once(look_up, batches, offsets, 2, 0.0).seconds.size == 0
    seen.clear()
    during = read_during(look_up, batches[:3], offsets, 2, lambda: time.sleep(0.05))
    assert during.seconds.size == len(seen) > 6 and not during.failures
    assert (during + taken).seconds.size == len(seen) + 19 and (during + taken).failures == taken.failures


def test_percentiles_are_of_all_lookups() -> None:
    held = percentiles([i / 1000 for i in range(1, 1002)])
    assert (held["p50"], held["p99"], held["max"], held["count"]) == pytest.approx((501, 991, 1001, 1001))
    assert percentiles([]) == {"count": 0}


def test_streams_are_seeded_and_as_skewed_as_they_say() -> None:
    stream = Zipf(1000, 1.0, 7)
    drawn = stream.draw(50_000)
    assert np.array_equal(drawn, Zipf(1000, 1.0, 7).draw(50_000))
    assert not np.array_equal(drawn, Zipf(1000, 1.0, 7, draw_seed=1).draw(50_000))
    top = np.bincount(drawn, minlength=1000).argmax()
    assert top == stream.ids[0] == Zipf(1000, 1.0, 7, draw_seed=1).ids[0]
    assert np.mean(drawn == top) == pytest.approx(1 / np.sum(1 / np.arange(1, 1001)), rel=0.05)
    moved = drifting(1000, 1.0, 7, 20_000)
    hottest = [set(np.argsort(np.bincount(part, minlength=1000))[-100:]) for part in (moved[:3000], moved[-3000:])]
    assert len(hottest[0] & hottest[1]) < 60


def test_traces(tmp_path: Path) -> None:
    text = "user item\n1 30\n1 10\n\n# end\n2 30\n"
    (tmp_path / "a.txt").write_text(text)
    with lzma.open(tmp_path / "a.xz", "wt") as file:
        file.write(text)
    for name in ("a.txt", "a.xz"):
        assert read_trace(tmp_path / name).tolist() == [1, 0, 1]
    (tmp_path / "b.txt").write_text("nothing\n")
    for name in ("b.txt", "none.txt"):
        with pytest.raises(SkipRow, match=name):
            read_trace(tmp_path / name)


def test_tools_that_are_missing_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SkipRow, match="apt-get install fio"):
        tools.need("fio")


def test_a_memory_group_is_made_and_removed_or_says_why_not() -> None:
    try:
        with memory_group.memory_group() as group:
            folder = group.procs.parent
            memory_group.set_limit(group.limit, 64 << 20)
            assert int(group.limit.read_text()) == 64 << 20
        assert not folder.exists()
    except SkipRow as reason:
        assert "memory cannot be limited" in str(reason)


def test_numbers() -> None:
    assert [number(v) for v in (None, 0, 1234567.0, 12.345, 1.0004)] == ["", "0", "1,234,567", "12.3", "1"]
