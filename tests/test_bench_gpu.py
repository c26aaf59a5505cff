"""The GPU benchmark's helpers say what they should, one row's failure leaves the others, and no GPU is no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor

from benchmarks import gpu
from benchmarks.figures import Figure, Goal, SkipRow
from benchmarks.gpu_context import GpuContext, Narrow
from benchmarks.gpu_profile import Kernel, Traffic, short_name
from benchmarks.gpu_report import GpuReport, draw, figure_from
from benchmarks.gpu_store import Pattern, PatternStore
from benchmarks.gpu_streams import DeviceZipf, Shape, Stream, distinct_ids, warming_batches, zipf_edges
from benchmarks.gpu_tables import INT8, CacheCost, Kind, fill_serving, ours_serving, stock_serving, tier_of, warm
from benchmarks.gpu_timing import back_to_back, split_rounds
from benchmarks.report import free_stem

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMALL = Shape(tables=2, rows=1000, bags=16, length=5)


@pytest.fixture
def context(tmp_path: Path) -> GpuContext:
    return GpuContext(quick=True, directory=tmp_path, seed=3, say=lambda text: None, device=CPU)


def report(folder: Path) -> GpuReport:
    about: dict[str, Any] = {"label": "h200", "date": "2026-11-22", "command": "python -m benchmarks.gpu", "commit": ""}
    about |= {"quick": False, "seed": 1, "machine": {"gpu": "a GPU"}, "versions": {"torch": "2"}}
    rows = {name: row.title for name, row in gpu.ROWS.items()}
    return GpuReport(about | {"rows": rows}, folder=folder, stem="2026-11-22-h200-gpu")


def test_zipf_draws_ranks_in_proportion() -> None:
    edges = zipf_edges(1000, 1.05, CPU)
    stream = DeviceZipf(edges, seed=1)
    assert sorted(stream.ids.tolist()) == list(range(1000)) and stream.ids.tolist() != list(range(1000))
    drawn = torch.bincount(stream.draw(200_000), minlength=1000)[stream.ids].double() / 200_000
    wanted = torch.arange(1, 1001).double() ** -1.05
    wanted /= wanted.sum()
    assert torch.allclose(drawn[:5], wanted[:5], rtol=0.05)
    assert torch.allclose(drawn.cumsum(0), wanted.cumsum(0), atol=0.01)
    assert torch.equal(DeviceZipf(edges, seed=1).draw(50), DeviceZipf(edges, seed=1).draw(50))
    assert not torch.equal(DeviceZipf(edges, seed=1).draw(50), DeviceZipf(edges, seed=2).draw(50))


def test_batches_of_a_stream() -> None:
    stream = Stream(SMALL, device=CPU, seed=5)
    first, second = stream.batches(2)
    assert first.shape == (160,) and first.dtype == torch.int64 and not torch.equal(first, second)
    assert stream.offsets.tolist() == list(range(0, 161, 5))
    assert int(torch.stack([first, second]).max()) < 1000
    bigger = Stream(Shape(tables=2, rows=1000, bags=64, length=5), device=CPU, seed=5)
    assert torch.equal(bigger._tables[0].ids, stream._tables[0].ids), "other batch sizes ask for the same hot rows"


def test_few_ids_of_a_large_table() -> None:
    stream = Stream(Shape(tables=1, rows=10**9, bags=64, length=20), device=CPU, seed=5, hot=50)
    ids = stream.batches(1)[0].unique()
    assert 20 < ids.numel() <= 50 and int(ids.max()) > 5 * 10**8


def test_distinct_ids_are_all_and_the_hottest_last() -> None:
    batches = [torch.tensor([4, 4, 9, 1, 1, 1]), torch.tensor([4, 2, 9, 7, 7, 1])]
    first, second = distinct_ids(batches, 2)
    assert first.tolist() == [2, 9, 4] and second.tolist() == [7, 1]


def test_warming_asks_for_every_id_in_order() -> None:
    ids = [torch.arange(7), torch.tensor([90, 91, 92])]
    asked: list[list[int]] = [[], []]
    for batch, offsets in warming_batches(ids, 4):
        assert torch.equal(offsets, torch.arange(batch.numel() + 1)) and batch.numel() <= 8
        for table, part in enumerate(batch.view(2, -1).tolist()):
            asked[table] += part
    assert asked[0] == list(range(7)) and list(dict.fromkeys(asked[1])) == [90, 91, 92]


def test_ours_and_stock_hold_the_rows_of_a_pattern() -> None:
    stream = Stream(SMALL, device=CPU, seed=5)
    batches = stream.batches(3)
    served = ours_serving(INT8, 2, 1000, slots=100, dram=None, device=CPU)
    stock = stock_serving(INT8, served.tables, CPU)
    fill_serving(stock, served.pattern, served.tables)
    warm(served.module, distinct_ids(batches, 2), 100)
    for batch in batches:
        served.check(batch, stream.offsets, stock)
    wrong = stock_serving(INT8, served.tables, CPU)
    with pytest.raises(RuntimeError, match="differs from stock's"):
        served.check(batches[0], stream.offsets, wrong)
    hits, reads = served.hits()
    assert 0 < hits < reads and served.nbytes >= 2 * 100 * 132 + 2 * 1000 * 4


def test_pattern_store_reads_what_was_written_last() -> None:
    tables = Kind(dim=8, data_type=SparseType.FP32).tables(2, 100)
    store = PatternStore(tables, Pattern(tables, seed=1))
    ids = torch.tensor([3, 99, 3])
    before, found = store.read("t1", ids)
    assert found.all() and torch.equal(before[0], before[2]) and not torch.equal(before[0], before[1])
    assert not torch.equal(before, store.read("t0", ids)[0])
    new = torch.arange(32, dtype=torch.uint8)[None]
    store.write({"t1": (torch.tensor([99]), new)})
    after, _ = store.read("t1", ids)
    assert torch.equal(after[1], new[0]) and torch.equal(after[0], before[0])
    whole = torch.cat([rows for _, rows in store.scan("t1", window=30)])
    assert whole.shape == (100, 32) and torch.equal(whole[ids], after)


def test_caches_of_equal_bytes() -> None:
    lru, lfu = CacheCost(144, lfu=False), CacheCost(144, lfu=True)
    assert lru.of_set == 32 * 160 and lfu.of_set == 32 * 152
    sets = lru.sets(40_000_000, 760_000_000, 0)
    spent = lru.fixed(40_000_000) + sets * lru.of_set
    assert lru.fixed(40_000_000) == 160_000_000 and 0 <= 760_000_000 - spent < lru.of_set
    # What counts each row may leave nothing for the cache.
    assert lfu.sets(40_000_000, 400_000_000, 64_000) == 2000 and lru.sets(10, 0, 0) == 1


def test_no_tier_is_no_argument() -> None:
    assert tier_of(None, 5, 2) == {} and tier_of(7, 5, 2) == {"dram_slots": [7, 7]}


def test_sides_take_turns() -> None:
    order: list[tuple[str, int]] = []
    batches = [torch.tensor([n]) for n in range(5)]
    rounds = split_rounds(batches, 2)
    assert [[int(b) for b in r] for r in rounds] == [[0, 1], [2, 3]]
    sides = {name: (lambda found, name=name: order.append((name, int(found[0])))) for name in "ab"}
    turns = back_to_back(sides, rounds, CPU)
    assert order == [("a", 0), ("b", 0), ("b", 2), ("a", 2)]
    pair = turns.pair("a", "b", lambda ms: 1 / ms)
    assert len(turns.rounds["a"]) == 2 and pair.ours[0] == pytest.approx(1 / turns.rounds["a"][0])


def test_narrow_batches() -> None:
    batches = [torch.tensor([5, 6]), torch.tensor([7, 8])]
    seen: list[Tensor] = []
    Narrow(batches, torch.tensor([0, 2])).caller(lambda ids, offsets: seen.append(ids))(batches[::-1])
    assert [each.tolist() for each in seen] == [[7, 8], [5, 6]] and seen[0].dtype == torch.int32


def test_bytes_of_a_batch() -> None:
    shape = Shape(tables=2, rows=100, bags=4, length=5)
    traffic = Traffic(
        shape=shape, misses=3, distinct=10, row_bytes=144, dram_bytes=160, out_bytes=2, dim=128, state_bytes=4
    )
    parts = traffic.parts()
    assert parts["remap"] == (40 * 44, False) and parts["row exchange"] == (480, True)
    assert parts["TBE forward"] == (40 * 148 + 2 * 4 * 128 * 2, False)
    assert parts["TBE backward"] == (40 * 256 + 2 * 10 * 148, False)


@pytest.mark.parametrize(
    ("name", "short", "part"),
    [
        ("remap", "remap", "remap"),
        ("exchange", "exchange", "row exchange"),
        (
            "void nbit::INT_8bit_split_embedding_codegen_forward_unweighted_kernel_small_L<int, (A)3>(int*)",
            "INT_8bit_split_embedding_codegen_forward_unweighted_kernel_small_L",
            "TBE forward",
        ),
        (
            "split_embedding_backward_codegen_rowwise_adagrad_kernel<float>",
            "split_embedding_backward_codegen_rowwise_adagrad_kernel",
            "TBE backward",
        ),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD", "other"),
    ],
)
def test_kernels_have_names_and_parts(name: str, short: str, part: str) -> None:
    assert short_name(name) == short[:60] and Kernel(short_name(name), 1, 1.0).part == part


def test_figures_come_back_from_a_file() -> None:
    figure = Figure(row="zipf", case="c", ours=3.0, theirs=2.0, goal=Goal(at_most=False, reach=1.5, aim=3), note="n")
    again = figure_from(json.loads(json.dumps(figure.to_json())))
    assert again == figure and again.verdict == "pass"


def test_a_row_that_raises_is_kept_and_the_others_run(
    tmp_path: Path, context: GpuContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def broken(gpu: GpuContext) -> Iterator[Figure]:
        yield Figure(row="broken", case="first", ours=1.0, theirs=2.0, goal=Goal(at_most=True, reach=1.5))
        gpu.kept["half made"] = 1
        raise ValueError("out of luck | and\nlines")

    def missing(gpu: GpuContext) -> Iterator[Figure]:
        raise SkipRow("not here")
        yield

    def works(gpu: GpuContext) -> Iterator[Figure]:
        written.append(len(json.loads((tmp_path / "2026-11-22-h200-gpu.json").read_text())["figures"]))
        assert not gpu.kept
        yield Figure(row="works", case="all", ours=3.0, peer="p", theirs=2.0, goal=Goal(at_most=True, reach=1.4))

    rows = {name: gpu.Row(name, work) for name, work in (("broken", broken), ("missing", missing), ("works", works))}
    monkeypatch.setattr(gpu, "ROWS", rows)
    found = report(tmp_path)
    assert gpu.run_rows(list(rows), context, found) == []
    assert written == [3], "each row is on disk before the next begins"
    whole = json.loads((tmp_path / "2026-11-22-h200-gpu.json").read_text())
    assert [f["verdict"] for f in whole["figures"]] == ["pass", "error", "skipped", "FAIL"]
    assert whole["figures"][1]["error"] == "ValueError: out of luck | and lines" and set(whole["seconds"]) == set(rows)
    page = (tmp_path / "2026-11-22-h200-gpu.md").read_text()
    assert "a GPU" in page and "| 3 | 2 (p) | 1.5 | ≤ 1.4 | FAIL |" in page and "out of luck / and lines" in page


def test_a_broken_device_leaves_rows_to_another_process(
    tmp_path: Path, context: GpuContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(gpu: GpuContext) -> Iterator[Figure]:
        yield Figure(row="a", case="c")

    monkeypatch.setattr(gpu, "ROWS", {name: gpu.Row(name, one) for name in "abc"})
    monkeypatch.setattr(gpu, "_device_works", lambda context: False)
    found = report(tmp_path)
    assert gpu.run_rows(list("abc"), context, found) == ["b", "c"]
    again = report(tmp_path / "elsewhere")
    again.resume(tmp_path / "2026-11-22-h200-gpu.json")
    assert again.figures == found.figures and again.folder == tmp_path and again.stem == found.stem


def test_no_row_begins_after_its_time(tmp_path: Path, context: GpuContext, monkeypatch: pytest.MonkeyPatch) -> None:
    late = GpuContext(**{**vars(context), "ends": 0.0})
    found = report(tmp_path)
    gpu.run_row("all-hit", late, found)
    assert [figure.verdict for figure in found.figures] == ["skipped"] and "--only" in found.figures[0].skipped


@pytest.mark.parametrize("row", ["all-hit", "zipf", "rows", "ssd"])
def test_rows_run_on_a_cpu(row: str, tmp_path: Path, context: GpuContext) -> None:
    """The same code, without a tier or UVM caching."""
    found = report(tmp_path)
    gpu.run_row(row, context, found)
    assert found.counts["error"] == 0, [figure.error for figure in found.figures]
    measured = [figure for figure in found.figures if figure.ours]
    assert measured and all(figure.row == row and figure.theirs for figure in measured)


def test_training_runs_on_a_cpu(tmp_path: Path, context: GpuContext) -> None:
    found = report(tmp_path)
    gpu.run_row("training", context, found)
    assert found.counts["error"] == 0, [figure.error for figure in found.figures]
    assert [figure.goal is not None for figure in found.figures] == [True, False] * 2


def test_a_page_with_kernels_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = report(tmp_path)
    kernels = [{"name": f"k{n}", "part": "other", "calls": 1, "us": 20.0 - n} for n in range(18)]
    points = [
        {"panel": panel, "line": line, "x": x, "ms": x / 3}
        for panel in ("tables", "rows of the table")
        for line in ("ours", "stock")
        for x in (1, 8)
    ]
    found.add(Figure(row="profile", case="zipf: all", ours=1.0, details={"kernels": kernels}))
    found.add(Figure(row="tables", case="c", ours=1.0, details={"points": points}))
    assert "![" not in found.write().read_text()
    found.draw()
    page = found.write().read_text()
    assert "Kernels of zipf:" in page and "| k0 | other | 1 | 20 |" in page and "2 more" in page
    assert "![Time of a batch](2026-11-22-h200-gpu.png)" in page
    assert (tmp_path / "2026-11-22-h200-gpu.png").read_bytes()[1:4] == b"PNG"
    assert free_stem(tmp_path, "2026-11-22-h200-gpu") == "2026-11-22-h200-gpu-2"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw(points, tmp_path / "none.png", "h200") and not (tmp_path / "none.png").exists()


def test_labels() -> None:
    assert gpu.gpu_label("NVIDIA H200") == "h200" and gpu.gpu_label("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"


def test_a_new_process_goes_on_where_this_one_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[list[str]] = []
    monkeypatch.setattr(gpu.os, "execv", lambda program, command: run.append(command))
    monkeypatch.setattr(gpu.os, "chdir", lambda folder: None)
    given = gpu.parse_arguments(["--quick", "--seed", "7", "--out", str(tmp_path)])
    gpu._hand_over(["rows", "ssd"], given, report(tmp_path), 12.5)
    again = gpu.parse_arguments(run[0][3:])
    assert run[0][:3] == [sys.executable, "-m", "benchmarks.gpu"] and again.only == ["rows", "ssd"] and again.quick
    assert (again.seed, again.budget, again.label, again.out) == (7, 12.5, "h200", tmp_path)
    assert again.resume == tmp_path / "2026-11-22-h200-gpu.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "needs an NVIDIA GPU" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_arguments() -> None:
    assert set(gpu.parse_arguments(["--only", *gpu.ROWS]).only) == set(gpu.ROWS)
    quick, whole = gpu.parse_arguments(["--quick"]), gpu.parse_arguments([])
    assert quick.out.name == "bench-out" and whole.out.name == "benchmarks" and quick.budget < 40 < whole.budget < 240
