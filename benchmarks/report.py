"""What a run found: lines as they come, one table at the end, a JSON file with everything, a page of Markdown."""

from __future__ import annotations

import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure, SkipRow, number

_STYLES = {"pass": "green", "FAIL": "bold red", "error": "bold red", "skipped": "yellow", "": ""}
_FORMAT = "torchrec_turbossd benchmark"
_LONGEST_ERROR = 500
"""Letters of it on the page."""


def free_stem(folder: Path, name: str) -> str:
    """`name`, or with the least number behind it that no results in `folder` have."""
    taken, stem = 1, name
    while (folder / f"{stem}.json").exists():
        taken += 1
        stem = f"{name}-{taken}"
    return stem


@dataclass
class Report:
    """Collects figures; each is printed at once."""

    about: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: Console(width=None if Console().is_terminal else 160))

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False, markup=False)

    def add(self, figure: Figure) -> None:
        """Note and print a figure."""
        self.figures.append(figure)
        verdict = figure.verdict or "info"
        text = f"  {verdict:7} {figure.case}: {_compared(figure)}"
        self.console.print(text, style=_STYLES[figure.verdict], highlight=False, markup=False)

    def summary(self) -> None:
        """Print the table."""
        table = Table(title="Ours beside the peers", title_justify="left")
        for name, right in (("row", 0), ("case", 0), ("ours", 1), ("peer", 1), ("ratio", 1), ("goal", 0), ("", 0)):
            table.add_column(name, justify="right" if right else "left")
        for f in self.figures:
            cells = [f.row, f"{f.case} ({f.unit})" if f.unit else f.case, number(f.ours), number(f.theirs)]
            table.add_row(*cells, number(f.ratio), str(f.goal or ""), f.verdict, style=_STYLES[f.verdict])
        self.console.print(table)

    @property
    def counts(self) -> dict[str, int]:
        """How many figures passed, failed, were skipped, and went wrong."""
        verdicts = [figure.verdict for figure in self.figures]
        return {verdict: verdicts.count(verdict) for verdict in ("pass", "FAIL", "skipped", "error")}

    def measure(self, name: str, title: str, figures: Callable[[], Iterable[Figure]]) -> list[str]:
        """Add the figures of a row, the time it took, and what it could not do; returns the warnings that came."""
        self.say(f"{name}: {title}")
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", RuntimeWarning)
            try:
                for figure in figures():
                    self.add(figure)
            except SkipRow as reason:
                self.add(Figure(row=name, case=title, skipped=str(reason)))
            except Exception as error:
                traceback.print_exc()
                text = " ".join(f"{type(error).__name__}: {error}".split())
                self.add(Figure(row=name, case=title, error=text[:_LONGEST_ERROR]))
        # What slows a row down without stopping it, such as a batch that did not fit in the slots.
        said = list(dict.fromkeys(str(w.message) for w in heard if issubclass(w.category, RuntimeWarning)))
        for each in said:
            self.say(f"  warning: {each}")
        self.seconds[name] = round(time.perf_counter() - start, 1)
        self.say(f"  {self.seconds[name]:.0f} s")
        return said

    def to_json(self, format_name: str) -> str:
        """All of it, as the text of a file of this format."""
        whole = {
            "format": format_name,
            "version": 1,
            **self.about,
            "seconds": self.seconds,
            "counts": self.counts,
            "figures": [figure.to_json() for figure in self.figures],
        }
        return json.dumps(whole, indent=1) + "\n"

    def save(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write `name`.json and `name`.md, under another name where there is one already; returns both."""
        folder.mkdir(parents=True, exist_ok=True)
        name = free_stem(folder, name)
        data, page = folder / f"{name}.json", folder / f"{name}.md"
        data.write_text(self.to_json(_FORMAT), encoding="utf-8")
        page.write_text(self.markdown(data.name), encoding="utf-8")
        return data, page

    def markdown(self, data: str) -> str:
        """The page: machine, versions, one table for each row, and what was skipped."""
        about = self.about
        machine = "; ".join(f"{name}: {value}" for name, value in about["machine"].items())
        versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
        lines = [
            f"# CPU benchmarks on {about['label']}, {about['date']}",
            "",
            f"`{about['command']}`, seed {about['seed']}, commit {about['commit'] or 'unknown'}.",
            f"{machine}. Load before and after: {about['load before']}, {about['load after']}.",
            f"{versions}.",
            "",
            "Ours and the peer ran in turns in one run; a ratio is the median of the rounds' ratios where there are",
            f"rounds. Everything measured is in `{data}`."
            + (" A quick run: its figures mean little." if about["quick"] else ""),
        ]
        for row in dict.fromkeys(figure.row for figure in self.figures):
            lines += ["", f"## {row}", "", f"{about['rows'][row]}.", "", *self._table(row)]
        return "\n".join(lines) + "\n"

    def _table(self, row: str) -> list[str]:
        lines = ["| case | ours | peer | ratio | goal | reached | note |", "|---|---|---|---|---|---|---|"]
        for f in self.figures:
            if f.row != row:
                continue
            theirs = f"{number(f.theirs)} ({f.peer})" if f.theirs is not None else f.peer
            note = "; ".join(filter(None, (f.skipped, f.error, f.note)))
            held = f.verdict or "informs"
            cells = (f.case, f"{number(f.ours)} {f.unit}", theirs, number(f.ratio), str(f.goal or ""), held, note)
            lines.append("| " + " | ".join(cell.replace("|", "/").strip() for cell in cells) + " |")
        return lines


def _compared(figure: Figure) -> str:
    if figure.error or figure.skipped:
        return figure.error or figure.skipped
    text = f"{number(figure.ours)} against {number(figure.theirs)} {figure.unit} ({figure.peer})"
    text += f", ratio {number(figure.ratio)}"
    goal = f", goal {figure.goal}" if figure.goal else ""
    return text + goal + (f"; {figure.note}" if figure.note else "")


__all__ = ["Report", "free_stem"]
