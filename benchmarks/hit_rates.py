"""Hit rates predicted against hit rates measured: `python -m benchmarks.hit_rates`.

Every stream is served from slots for 1, 5, 10 and 25 % of its rows, and its second half is counted. The predictions
come from a sample of the whole stream, from a much smaller one, from the first half alone, and, where popularity is
known, from that. Exits with 1 when a prediction from a sample of the same traffic is off by more than 3 points.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from benchmarks import page as pages
from benchmarks.context import Context
from benchmarks.figures import SkipRow
from benchmarks.hbm import hbm_section, scaled_section
from benchmarks.measured import second_halves
from benchmarks.mixed import mixed_section
from benchmarks.page import Page, Section
from benchmarks.predictions import SMALL_SAMPLE, Predictions, predict
from benchmarks.traffic import Case, cases
from torchrec_turbossd.metrics import TableReads

GOAL, AIM = 3.0, 1.0
"""Points by which a prediction from a sample of the same traffic may be off, and would better be off at most."""

PREDICTED = {"whole": "sample", "small": "small sample", "past": "first half", "known": "Zipf"}
"""The predictions, by their names in the file and in the table."""

_STYLES: dict[str, dict[str, Any]] = {
    "whole": {"color": "tab:blue"},
    "small": {"color": "tab:cyan", "linestyle": "--"},
    "past": {"color": "tab:orange", "linestyle": "-."},
    "known": {"color": "tab:green", "linestyle": ":"},
}
_PROGRAM = "benchmarks.hit_rates"
_NOTE = f"""\
Columns after "measured" are points by which a prediction is too high. "sample": `AccessProfile.from_trace` over the
whole stream; "small sample": the same with `events={SMALL_SAMPLE:,}`; both are held to {GOAL:g} points (aim {AIM:g}).
"first half": `from_trace` over the first half alone, so a forecast, without a goal: it is off where traffic changes.
"Zipf": `AccessProfile.zipf` through the model, for independent lookups once everything is warm. "slots / rows": what
FBGEMM's TurboSSD takes the hit rate to be. A sample keeps the latest lookups, of fewer rows the longer ago: of traffic
that changes, a small one knows for few slots what the last lookups did, not the whole second half."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cache: hit rates per lookup. The fields are those of the JSON file."""

    stream: str
    rows: int
    lookups: int
    batch: int
    slots: int
    measured: float
    whole: float
    small: float
    past: float
    known: float | None

    @property
    def rule(self) -> float:
        """What FBGEMM's TurboSSD says."""
        return self.slots / self.rows

    def points(self, prediction: str) -> float | None:
        """By how many points a prediction is too high."""
        predicted: float | None = getattr(self, prediction)
        return None if predicted is None else 100 * (predicted - self.measured)

    @property
    def off(self) -> float:
        """Points by which the predictions that have a goal are off at most."""
        return max(abs(self.points(name) or 0.0) for name in ("whole", "small"))

    def cells(self) -> list[str]:
        share = f"{self.slots:,} ({self.slots / self.rows:.0%})"
        off = [signed(self.points(name)) for name in PREDICTED]
        return [self.stream, share, f"{self.batch:,}", f"{self.measured:.1%}", *off, signed(self.points("rule"))]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was predicted for a stream and what was measured: a row for each cache."""

    case: Case
    predictions: Predictions
    rows: list[Row]


def signed(points: float | None) -> str:
    """Points with their sign; nothing where there is no prediction."""
    return "" if points is None else f"{points:+.1f}"


def measure(context: Context) -> Iterator[Found]:
    """Every stream, with what it says on its way."""
    for case in cases(context):
        if isinstance(case, SkipRow):
            context.say(f"left out: {case}")
            continue
        predictions = predict(case.traffic, case.alpha)
        with context.scratch("hit-rates") as folder:
            (reads,) = second_halves([case.traffic], [case.slots], folder)
        rows = [_row(case, slots, read, predictions) for slots, read in zip(case.slots, reads, strict=True)]
        for row in rows:
            context.say("  ".join(row.cells()))
        yield Found(case=case, predictions=predictions, rows=rows)


def _row(case: Case, slots: int, read: TableReads, predictions: Predictions) -> Row:
    return Row(
        stream=case.name,
        rows=case.traffic.table.rows,
        lookups=case.traffic.asked.size,
        batch=case.traffic.batch,
        slots=slots,
        measured=read.hit_rate,
        whole=predictions.whole.hit_rate(slots),
        small=predictions.small.hit_rate(slots),
        past=predictions.past.hit_rate(slots),
        known=predictions.known.hit_rate(slots) if predictions.known else None,
    )


def _section(rows: Sequence[Row]) -> Section:
    return Section(
        title="Predicted against measured",
        columns=["stream", "slots", "batch", "measured", *PREDICTED.values(), "slots / rows"],
        rows=[row.cells() for row in rows],
        before="Hits per lookup of the second half, served from slots that the first half warmed.",
        after=_NOTE.replace("\n", " "),
    )


def draw(found: Sequence[Found], picture: Picture) -> None:
    """A panel for each stream: curves predicted, points measured."""
    across = 4
    down = -(-len(found) // across)
    picture.set_size_inches(3.4 * across, 2.7 * down + 0.5)
    panels = picture.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, one in zip(panels, found, strict=False):
        _panel(panel, one)
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    picture.supxlabel("slots, share of rows")
    picture.supylabel("hits per lookup")
    labelled = max(panels[: len(found)], key=lambda panel: len(panel.get_legend_handles_labels()[0]))
    picture.legend(*labelled.get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)


def _panel(panel: Axes, one: Found) -> None:
    shares = np.geomspace(0.002, 1.0, 80)
    for name, style in _STYLES.items():
        curve = getattr(one.predictions, name)
        if curve is not None:
            rates = curve.hit_rate(shares * one.case.traffic.table.rows)
            panel.plot(shares, rates, linewidth=1.3, label=PREDICTED[name], **style)
    panel.plot(shares, shares, color="0.6", linewidth=1, label="slots / rows")
    panel.plot([row.rule for row in one.rows], [row.measured for row in one.rows], "ko", markersize=5, label="measured")
    panel.set_xscale("log")
    panel.set_ylim(0, 1)
    panel.set_title(one.case.name, fontsize=9)
    panel.grid(alpha=0.3)


def run(page: Page, context: Context) -> list[Found]:
    """All sections; returns what to draw."""
    found = list(measure(context))
    rows = [row for one in found for row in one.rows]
    page.data["hit rates"] = [asdict(row) | {"slots / rows": row.rule} for row in rows]
    page.missed += [
        f"{row.stream} with {row.slots:,} slots: off by {row.off:.1f} points, {GOAL:g} allowed"
        for row in rows
        if row.off > GOAL
    ]
    page.add(_section(rows))
    close = sum(row.off <= AIM for row in rows)
    page.say(f"{len(rows)} caches, {close} of them predicted within {AIM:g} point.")
    page.add(mixed_section(page, context, [(one.case, one.predictions) for one in found if one.case.together]))
    page.add(hbm_section(page))
    page.add(scaled_section(page, context))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns 1 where a goal was missed, in a run that is not quick."""
    parser = pages.parser(_PROGRAM, __doc__)
    parser.add_argument(
        "--traces", type=Path, nargs="+", default=[], help="files of ids to replay: text, or text in .xz"
    )
    given = parser.parse_args(arguments)
    page, context = pages.start("Hit rates, predicted and measured", given, _PROGRAM, arguments)
    found = run(page, context)
    kept = page.save(given.out, f"{page.about['date']}-{given.label}-hit-rates", lambda picture: draw(found, picture))
    page.say(f"{'; '.join(page.missed) or 'Every goal was reached'}. Written: {kept}")
    return 1 if page.missed and not given.quick else 0


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["AIM", "GOAL", "PREDICTED", "Found", "Row", "draw", "main", "measure", "run", "signed"]
