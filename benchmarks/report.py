"""What a run found: lines as they come, one table at the end, a JSON file with everything, a page of Markdown."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure, number

_STYLES = {"pass": "green", "FAIL": "bold red", "error": "bold red", "skipped": "yellow", "": ""}
_FORMAT = "torchrec_turbossd benchmark"


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

    def save(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write `name`.json and `name`.md, under another name where there is one already; returns both."""
        folder.mkdir(parents=True, exist_ok=True)
        taken, base = 1, name
        while (folder / f"{name}.json").exists():
            taken += 1
            name = f"{base}-{taken}"
        data, page = folder / f"{name}.json", folder / f"{name}.md"
        whole = {
            "format": _FORMAT,
            "version": 1,
            **self.about,
            "seconds": self.seconds,
            "counts": self.counts,
            "figures": [figure.to_json() for figure in self.figures],
        }
        data.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
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
        lines = ["| case | ours | peer | ratio | goal | held | note |", "|---|---|---|---|---|---|---|"]
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


__all__ = ["Report"]
