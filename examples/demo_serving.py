"""Serving what was trained: a snapshot, then rows as they change, then another snapshot, while lookups go on."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from demo_model import access_profiles
from demo_report import Report
from demo_settings import Settings
from demo_training import SERVED_TYPE, ChangedRows
from fbgemm_gpu.split_embedding_configs import SparseType
from source_tokens import FEATURES, TABLES, SampleStream
from stock_tables import StockTables
from torch import Tensor

from torchrec_turbossd.serving import TurboSSDInferenceModule

SPECS = [(table, rows, dim, SERVED_TYPE) for table, (rows, dim) in TABLES.items()]
FEATURE_TABLE_MAP = [list(TABLES).index(feature.table) for feature in FEATURES]

_BATCHES, _BATCH_SIZE = 128, 256
_LOOKUPS_AROUND = 100
_WAIT_S = 60.0

Batch = tuple[Tensor, Tensor]
"""(indices [N], offsets [features x B + 1]), as FBGEMM's modules are called."""


@dataclass(frozen=True)
class Lookup:
    """One lookup of the reader: when, the snapshot that its whole answer is of, and what came from slots."""

    started: float
    ended: float
    answer: str
    hits: int
    reads: int

    @property
    def seconds(self) -> float:
        return self.ended - self.started


@dataclass(frozen=True)
class Swap:
    """What happened around one `load_snapshot`: when it began, how long it took, and all lookups of the reader."""

    started: float
    seconds: float
    lookups: list[Lookup] = field(repr=False)

    @property
    def during(self) -> list[Lookup]:
        ended = self.started + self.seconds
        return [one for one in self.lookups if one.ended > self.started and one.started < ended]

    def hit_rates(self) -> tuple[float, float]:
        """Of the lookups just before and just after."""
        before = [one for one in self.lookups if one.ended <= self.started][-_LOOKUPS_AROUND:]
        after = [one for one in self.lookups if one.started >= self.started + self.seconds][:_LOOKUPS_AROUND]
        return _hit_rate(before), _hit_rate(after)


class Reader(threading.Thread):
    """Looks batches up, one after the other, until it is stopped, and judges each answer.

    An answer is "old" or "new" when it equals, in every number, that of the old or the new rows; else it is "mixed".
    """

    def __init__(
        self, server: TurboSSDInferenceModule, batches: list[Batch], old: list[Tensor], new: list[Tensor]
    ) -> None:
        super().__init__(daemon=True)
        self._server, self._batches, self._old, self._new = server, batches, old, new
        self._stopped = threading.Event()
        self.lookups: list[Lookup] = []
        self.failure: Exception | None = None

    def run(self) -> None:
        place = 0
        try:
            self._server.get_read_hit_rate_stats()
            while not self._stopped.is_set():
                started = time.perf_counter()
                answer = self._server(*self._batches[place])
                ended = time.perf_counter()
                hits, _, reads = self._server.get_read_hit_rate_stats()
                self.lookups.append(Lookup(started, ended, self._judge(place, answer), hits, reads))
                place = (place + 1) % len(self._batches)
        except Exception as error:
            self.failure = error

    def _judge(self, place: int, answer: Tensor) -> str:
        if torch.equal(answer, self._old[place]):
            return "old"
        return "new" if torch.equal(answer, self._new[place]) else "mixed"

    def wait_for(self, more: int) -> None:
        """Return when `more` further lookups have ended, or the reader has failed."""
        wanted, limit = len(self.lookups) + more, time.perf_counter() + _WAIT_S
        while len(self.lookups) < wanted and self.is_alive() and time.perf_counter() < limit:
            time.sleep(0.002)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def serve(settings: Settings, stream: SampleStream, report: Report) -> Swap:
    """Serve the first snapshot, update it, exchange it for the second; compare all answers with stock tables."""
    batches = _batches(settings, stream)
    stock = StockTables(SPECS, FEATURE_TABLE_MAP, settings.device)
    stock.fill(settings.scratch / "memory")
    with TurboSSDInferenceModule.from_embedding_specs(
        SPECS,
        ssd_directory=settings.ssd_directory / "serving",
        hbm_budget_gb=settings.budget_bytes / (1 << 30),
        feature_table_map=FEATURE_TABLE_MAP,
        output_dtype=SparseType.FP32,
        device=settings.device,
        access=access_profiles(stream.corpus),
    ) as server:
        answers = _serve_snapshot(settings, server, stock, batches, report)
        answers = _update(settings, server, stock, (batches, answers), report)
        return _exchange(settings, server, stock, (batches, answers), report)


def _batches(settings: Settings, stream: SampleStream) -> list[Batch]:
    """Samples that training comes to last, if ever."""
    found = []
    for number in range(1, _BATCHES + 1):
        features = stream.features(stream.places(-number, _BATCH_SIZE)).to(settings.device)
        found.append((features.values(), features.offsets()))
    return found


def _look_up_all(tables: TurboSSDInferenceModule | StockTables, batches: list[Batch]) -> list[Tensor]:
    look_up = tables.look_up if isinstance(tables, StockTables) else tables
    return [look_up(*batch).clone() for batch in batches]


def _serve_snapshot(
    settings: Settings, server: TurboSSDInferenceModule, stock: StockTables, batches: list[Batch], report: Report
) -> list[Tensor]:
    report.title("A server loads the first snapshot")
    started = time.perf_counter()
    server.load_snapshot(settings.scratch / "ssd" / "train")
    report.figure("time to load the first snapshot", f"{time.perf_counter() - started:.2f} s")
    rows, slots = sum(spec[1] for spec in SPECS), sum(server.slots.values())
    report.figure("rows that the server keeps in slots", f"{slots:,} of {rows:,} ({slots / rows:.1%})")
    answers, expected = _look_up_all(server, batches), _look_up_all(stock, batches)
    _check_equal(report, "the server answers as FBGEMM's module with all rows in memory", answers, expected)
    return answers


def _update(
    settings: Settings,
    server: TurboSSDInferenceModule,
    stock: StockTables,
    seen: tuple[list[Batch], list[Tensor]],
    report: Report,
) -> list[Tensor]:
    report.title("Rows that training changes go to the server")
    batches, before = seen
    changed: ChangedRows = torch.load(settings.scratch / "ssd" / "update.pt")
    count, started = sum(ids.numel() for ids, _ in changed.values()), time.perf_counter()
    for table, (ids, rows) in changed.items():
        server.streaming_update(ids, rows, table=table, version=2)
    seconds = time.perf_counter() - started
    report.figure("rows updated", f"{count:,} in {seconds:.2f} s ({count / seconds:,.0f} rows/s)")
    after = _look_up_all(server, batches)
    different = stock.replace(torch.load(settings.scratch / "memory" / "update.pt"))
    touched = torch.cat([_touching(batch, different) for batch in batches])
    moved = torch.cat([_bags_that_differ(*pair) for pair in zip(before, after, strict=True)])
    report.figure("bags whose answer the update changed", f"{int(moved.sum()):,} of {moved.numel():,}")
    report.check(
        "answers changed where a bag has an updated row",
        f"{int((touched & moved).sum()):,} of {int(touched.sum()):,} such bags changed",
        held=bool(touched.any()) and bool(moved[touched].all()),
    )
    report.check(
        "and nowhere else",
        f"{int((moved & ~touched).sum()):,} of {int((~touched).sum()):,} other bags changed",
        held=not bool(moved[~touched].any()),
    )
    _check_equal(report, "updated answers are those of the stock module", after, _look_up_all(stock, batches))
    return after


def _exchange(
    settings: Settings,
    server: TurboSSDInferenceModule,
    stock: StockTables,
    seen: tuple[list[Batch], list[Tensor]],
    report: Report,
) -> Swap:
    report.title("The second snapshot takes over while lookups go on")
    batches, old = seen
    stock.replace(torch.load(settings.scratch / "memory" / "refresh.pt"))
    new = _look_up_all(stock, batches)
    reader = Reader(server, batches, old, new)
    reader.start()
    reader.wait_for(_BATCHES + _LOOKUPS_AROUND)
    started = time.perf_counter()
    server.load_snapshot(settings.scratch / "ssd" / "refresh")
    swap = Swap(started, time.perf_counter() - started, reader.lookups)
    reader.wait_for(_BATCHES + _LOOKUPS_AROUND)
    reader.stop()
    _report_swap(swap, reader.failure, report)
    tell_apart = sum(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
    report.check(
        "the snapshots can be told apart",
        f"{tell_apart} of {len(new)} batches have other answers",
        tell_apart == len(new),
    )
    _check_equal(report, "answers after the swap are those of the stock module", _look_up_all(server, batches), new)
    return swap


def _report_swap(swap: Swap, failure: Exception | None, report: Report) -> None:
    times = np.array([one.seconds for one in swap.during]) * 1e3
    quiet = np.array([one.seconds for one in swap.lookups if one.ended <= swap.started]) * 1e3
    before, after = swap.hit_rates()
    report.figure("time of the swap", f"{swap.seconds:.2f} s, {len(swap.during):,} lookups meanwhile")
    report.figure(
        "time of a lookup, median / 99th percentile",
        f"{np.median(quiet):.2f} / {np.quantile(quiet, 0.99):.2f} ms before, "
        f"{np.median(times):.2f} / {np.quantile(times, 0.99):.2f} ms during the swap",
    )
    report.figure("hit rate before and after the swap", f"{before:.1%}, {after:.1%}")
    report.check(
        "no lookup failed",
        f"{len(swap.lookups):,} lookups, {failure or 'no error'}",
        failure is None and times.size > 0,
    )
    answers = [one.answer for one in swap.lookups]
    old, new = answers.count("old"), answers.count("new")
    report.check(
        "every answer is of one snapshot",
        f"{old:,} of the old, then {new:,} of the new, {answers.count('mixed')} of both",
        held=answers == ["old"] * old + ["new"] * new and old > 0 and new > 0,
    )


def _hit_rate(lookups: list[Lookup]) -> float:
    return sum(one.hits for one in lookups) / max(1, sum(one.reads for one in lookups))


def _check_equal(report: Report, what: str, answers: list[Tensor], expected: list[Tensor]) -> None:
    largest = max(float((a - b).abs().max()) for a, b in zip(answers, expected, strict=True))
    equal = all(torch.equal(a, b) for a, b in zip(answers, expected, strict=True))
    count = sum(answer.numel() for answer in answers)
    report.check(what, f"largest difference of {count:,} numbers: {largest:g}", equal)


def _bags_that_differ(before: Tensor, after: Tensor) -> Tensor:
    """Which bags have another answer: [features, B] bool, on the CPU."""
    widths = [TABLES[feature.table][1] for feature in FEATURES]
    return torch.stack([part.any(1) for part in (before != after).split(widths, dim=1)]).cpu()


def _touching(batch: Batch, changed: dict[str, Tensor]) -> Tensor:
    """Which bags have a changed row: [features, B] bool, on the CPU."""
    values, start, touched = batch[0].cpu(), 0, []
    for feature in FEATURES:
        rows = values[start : start + _BATCH_SIZE * feature.window].view(_BATCH_SIZE, feature.window)
        touched.append(torch.isin(rows, changed[feature.table]).any(1))
        start += rows.numel()
    return torch.stack(touched)


__all__ = ["Lookup", "Reader", "Swap", "serve"]
