"""The benchmarks of sizing measure what they say, and tell by their status when a goal is missed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fbgemm_gpu.split_embedding_configs import SparseType

from benchmarks import brute_force, budget_split, hit_rates, traffic
from benchmarks.context import Context
from benchmarks.hbm import ROWS, hbm_section, static_optimum
from benchmarks.hit_rates import Row
from benchmarks.measured import Traffic, overall, second_halves
from benchmarks.page import Page
from benchmarks.splits import OURS, all_splits, fewest_misses, in_proportion, items_of, spent
from benchmarks.streams import Zipf
from torchrec_turbossd.metrics import TableReads
from torchrec_turbossd.sizing import BYTES_PER_SLOT, AccessProfile, HitRateCurve
from torchrec_turbossd.tables import TableSpec


def traffic_of(rows: int, count: int, batch: int, *, dim: int = 8, alpha: float = 1.0, name: str = "t") -> Traffic:
    table = TableSpec(name=name, rows=rows, dim=dim, data_type=SparseType.INT8)
    return Traffic(table=table, ids=Zipf(rows, alpha, 3).draw(count), batch=batch)


def page_of() -> Page:
    return Page("test", {})


@pytest.fixture
def small(tmp_path: Path) -> Context:
    return Context(quick=True, directory=tmp_path / "data", seed=5, say=lambda text: None)


def results(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.json")
    whole: dict[str, Any] = json.loads(file.read_text())
    assert file.with_suffix(".png").stat().st_size > 10_000
    return whole


def test_hit_rates_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "demo_cases", lambda context: iter(()))
    trace = tmp_path / "ids.txt"
    trace.write_text("".join(f"user {i * i % 2017}\n" for i in range(4000)))
    given = ["--quick", "--label", "here", "--out", str(tmp_path / "out"), "--directory", str(tmp_path / "data")]
    assert hit_rates.main([*given, "--traces", str(trace), str(tmp_path / "none.txt")]) == 0
    found = results(tmp_path / "out")
    assert found["quick"] and found["machine"]["cores"] and "torch" in found["versions"] and found["seed"]
    assert str(tmp_path) not in found["command"] and "ids.txt" in found["command"]
    rows = {(row["stream"], row["slots"]): row for row in found["hit rates"]}
    assert len({stream for stream, _ in rows}) == 5 and len(rows) == 4 * 2 + 1
    for row in rows.values():
        assert 0 < row["measured"] < 1 and row["slots / rows"] == row["slots"] / row["rows"]
        assert (row["known"] is None) != ("Zipf" in row["stream"] and "drifts" not in row["stream"])
    # Short traces are only modelled, which is close where popularity stays.
    hot = rows["Zipf 1.05", 300]
    assert abs(hot["whole"] - hot["measured"]) < 0.03 and abs(hot["known"] - hot["measured"]) < 0.03
    assert len(found["several tables"]) == 1 and abs(found["measured at 90 %"]["measured"] - 0.9) < 0.03
    page = next((tmp_path / "out").glob("*-here-hit-rates.md")).read_text()
    assert all(f"## {title}" in page for title in ("Predicted against", "Several tables", "HBM", "The same, measured"))
    assert not list((tmp_path / "data").iterdir()), "data files are left behind"


def test_budget_split_runs(tmp_path: Path) -> None:
    given = ["--quick", "--label", "here", "--out", str(tmp_path / "out"), "--directory", str(tmp_path / "data")]
    assert budget_split.main(given) == 0
    found = results(tmp_path / "out")
    (one,) = found["budgets"]
    assert set(one["measured"]) == set(one["slots"]) == {OURS, *budget_split.RULES}
    assert all(0 < missed < 1 for missed in one["measured"].values())
    assert all(one["bytes"] * 0.99 < used <= one["bytes"] for used in one["bytes spent"].values())
    assert min(one["expected"], key=one["expected"].__getitem__) == OURS
    tried = {row["what"]: row["ratio"] for row in found["every split"]}
    assert len(tried) == 9 and all(ratio >= 1 - 1e-9 for ratio in tried.values())
    assert all(ratio <= 1.01 for what, ratio in tried.items() if not what.startswith("served"))


@pytest.mark.parametrize("command", [hit_rates, budget_split])
def test_a_missed_goal_shows_in_the_status(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def goals(missed: list[str]) -> Callable[[Page, Context], list[Any]]:
        def run(page: Page, context: Context) -> list[Any]:
            page.missed += missed
            return []

        return run

    monkeypatch.setattr(command, "draw", lambda found, picture: None)
    given = ["--out", str(tmp_path), "--directory", str(tmp_path / "data"), "--label", "x"]
    for missed, words, status in ((["far off"], [], 1), (["far off"], ["--quick"], 0), ([], [], 0)):
        monkeypatch.setattr(command, "run", goals(missed))
        assert command.main([*given, *words]) == status
    pages = sorted(tmp_path.glob("*.md"), key=lambda path: (len(path.name), path.name))
    assert len(pages) == 3, "a later run must not overwrite an earlier one"
    assert "Missed: far off" in pages[0].read_text() and "Every goal was reached" in pages[2].read_text()


def test_what_is_off_by_more_than_the_goal_is_missed(small: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(traffic.zipf_cases(small))
    monkeypatch.setattr(hit_rates, "cases", lambda context: iter([case]))
    monkeypatch.setattr(hit_rates, "scaled_section", lambda page, context: hbm_section(page))
    page = page_of()
    hit_rates.run(page, small)
    assert not [text for text in page.missed if "with 300 slots" in text]
    monkeypatch.setattr(hit_rates, "GOAL", 0.0)
    page = page_of()
    hit_rates.run(page, small)
    assert sum("slots: off by" in text for text in page.missed) == 2


def test_points() -> None:
    row = Row(
        stream="s",
        rows=100,
        lookups=10,
        batch=1,
        slots=10,
        measured=0.5,
        whole=0.52,
        small=0.46,
        past=0.9,
        known=None,
    )
    assert row.points("whole") == pytest.approx(2) and row.points("small") == pytest.approx(-4)
    assert row.off == pytest.approx(4) and row.points("known") is None and row.points("rule") == pytest.approx(-40)
    assert row.cells() == ["s", "10 (10%)", "1", "50.0%", "+2.0", "-4.0", "+40.0", "", "-40.0"]


def test_only_the_second_half_is_counted(tmp_path: Path) -> None:
    made = [traffic_of(500, 4_030, 40), traffic_of(300, 8_000, 80, name="u")]
    assert made[0].asked.size == 4_000 and made[0].first_half.size == 2_000
    counted = second_halves(made, [(500, 50), (300,)], tmp_path)
    for each, (whole, *fewer) in zip(made, counted, strict=True):
        half = each.first_half.size
        new = np.setdiff1d(each.asked[half:], each.asked[:half])
        assert (whole.read_total_count, whole.read_miss_count) == (half, new.size)
        assert all(some.read_total_count == half and some.read_miss_count > new.size for some in fewer)
    assert overall([TableReads(1, 1), TableReads(5, 1)]) == 0.75


def test_the_cache_sees_each_table_s_own_traffic(tmp_path: Path) -> None:
    both = [traffic_of(2000, 20_000, 50, name="a"), traffic_of(2000, 20_000, 50, alpha=0.5, name="b")]
    (a,), (b,) = second_halves(both, [(100,), (100,)], tmp_path / "both")
    ((alone,),) = second_halves(both[:1], [(100,)], tmp_path / "alone")
    assert a == alone and a.hit_rate > b.hit_rate + 0.2


def test_the_best_of_all_combinations() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        choices = [(random.integers(1, 30, n).astype(float), random.random(n)) for n in (4, 5, 6)]
        budget = int(random.integers(20, 80))
        fits = {
            places: sum(missed[p] for (_, missed), p in zip(choices, places, strict=True))
            for places in itertools.product(*(range(len(sizes)) for sizes, _ in choices))
            if sum(sizes[p] for (sizes, _), p in zip(choices, places, strict=True)) <= budget
        }
        misses, places = fewest_misses(choices, budget)
        if fits:
            assert misses == pytest.approx(min(fits.values())) and fits[places] == pytest.approx(misses)
        else:
            assert misses == np.inf


def test_rules_of_thumb_spend_the_same_and_as_they_say() -> None:
    items = items_of([traffic_of(5000, 4000, 40, name="a"), traffic_of(1000, 4000, 40, dim=64, name="b")])
    whole = spent(items, [5000, 1000])
    splits = all_splits(items, whole // 4)
    assert all(0.995 < spent(items, slots) / (whole // 4) <= 1 for slots in splits.values())
    a, b = (item.bytes_per_slot for item in items.values())
    equal = splits["equal bytes"]
    assert equal[0] * a == pytest.approx(equal[1] * b, rel=0.01)
    assert splits["bytes by rows"][0] * a == pytest.approx(5 * splits["bytes by rows"][1] * b, rel=0.01)
    assert splits["same share of rows"] == pytest.approx([1250, 250], rel=0.01)
    # A table that cannot take its part leaves it to the other, and none has less than a batch.
    assert in_proportion(items, whole // 2, np.array([1.0, 1e6]))[1] == 1000
    assert in_proportion(items, whole // 100, np.array([1.0, 1e6]))[0] == 40


def test_the_planner_finds_the_best_split() -> None:
    slots, misses, best = brute_force.planned(40_000)
    assert len(slots) == 3 and best <= misses * (1 + 1e-9) and misses <= 1.01 * best


def test_memory_on_paper_counts_everything() -> None:
    page = page_of()
    hbm_section(page)
    found = page.data["memory for 90 %"]
    slots = HitRateCurve(AccessProfile.zipf(ROWS, 1.05)).slots_for(0.9)
    assert found["slots"] == slots and 0.7 * slots < found["static optimum"] < slots
    (wide,) = (one for one in found["by row"] if one["rows"] == "INT8 x 128")
    least, most = ((144 + extra) * slots + 4 * ROWS for extra in (0, BYTES_PER_SLOT + 1))
    assert least < wide["ours GiB"] * 2**30 < most
    assert wide["theirs GiB"] == pytest.approx(1.44e9 * 144 / 2**30) and wide["ratio"] <= 0.1 > wide["without map"]


def test_the_static_optimum() -> None:
    profile = AccessProfile.from_counts(np.array([6, 3, 1, 0]))
    assert [static_optimum(profile, rate) for rate in (0.5, 0.6, 0.7, 0.9, 0.95)] == [1, 1, 2, 2, 3]
