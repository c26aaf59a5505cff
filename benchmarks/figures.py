"""What one measurement says: ours beside a named peer's, their ratio, and whether the goal was reached."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


class SkipRow(Exception):
    """This machine cannot measure a row; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What the ratio of ours to the peer's must reach: at most, or at least, `reach`; `aim` is what would be better."""

    at_most: bool
    reach: float
    aim: float | None = None

    def held(self, ratio: float) -> bool:
        return ratio <= self.reach if self.at_most else ratio >= self.reach

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        return f"{sign} {self.reach:g}" + (f" (aim {self.aim:g})" if self.aim is not None else "")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table.

    Attributes:
        row: the name of the benchmark row. case: what of it was measured.
        unit: of `ours` and `theirs`.
        peer: what `theirs` is a figure of.
        goal: of the ratio; None for a line that only informs.
        failures: operations that raised; a goal is not held with any.
        note: one line for the reader.
        details: further numbers, for the JSON file alone.
        skipped: why nothing was measured.
        error: what went wrong instead.
    """

    row: str
    case: str
    unit: str = ""
    ours: float | None = None
    peer: str = ""
    theirs: float | None = None
    goal: Goal | None = None
    failures: int = 0
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""
    error: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over theirs."""
        if self.ours is None or not self.theirs:
            return None
        return self.ours / self.theirs

    @property
    def held(self) -> bool | None:
        """Whether the goal was reached; None where there is none, or nothing to compare."""
        if self.goal is None or self.ratio is None or not math.isfinite(self.ratio):
            return None
        return self.failures == 0 and self.goal.held(self.ratio)

    @property
    def verdict(self) -> str:
        if self.error:
            return "error"
        if self.skipped:
            return "skipped"
        return {True: "pass", False: "FAIL", None: ""}[self.held]

    def to_json(self) -> dict[str, Any]:
        whole = asdict(self)
        whole["goal"] = None if self.goal is None else {**asdict(self.goal), "text": str(self.goal)}
        return {**whole, "ratio": self.ratio, "verdict": self.verdict}


def number(value: float | None) -> str:
    """A figure with three or four digits that count, thousands apart."""
    if value is None:
        return ""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 2 else f"{value:.4g}"


__all__ = ["Figure", "Goal", "SkipRow", "number"]
