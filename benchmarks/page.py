"""What a benchmark of its own command leaves: tables on the terminal, and a page, a picture and a file of numbers."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.context import Context

_ROOT = Path(__file__).absolute().parents[1]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table with a title, text before it, and text after it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    before: str = ""
    after: str = ""

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", *([self.before, ""] if self.before else [])]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *(["", self.after] if self.after else [])])

    def show(self, console: Console) -> None:
        table = Table(title=self.title, title_justify="left")
        for place, name in enumerate(self.columns):
            table.add_column(name, justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        if self.after:
            console.print(self.after, style="dim", highlight=False, markup=False)


@dataclass
class Page:
    """Collects sections; each is printed at once.

    Attributes:
        title: of the page.
        about: machine, versions, command.
        data: everything measured, for the JSON file.
        missed: goals that were not reached, in words.
    """

    title: str
    about: dict[str, Any]
    sections: list[Section] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    console: Console = field(default_factory=lambda: Console(width=None if Console().is_terminal else 160))

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False, markup=False)

    def add(self, section: Section) -> None:
        self.sections.append(section)
        section.show(self.console)

    def save(self, folder: Path, name: str, draw: Callable[[Figure], None]) -> Path:
        """Write `name`.md, `name`.json and `name`.png, under another name where there is one already; returns the page.

        `draw` fills the picture.
        """
        folder.mkdir(parents=True, exist_ok=True)
        taken, base = 1, name
        while (folder / f"{name}.json").exists():
            taken += 1
            name = f"{base}-{taken}"
        self.about["load after"] = machine.load()
        picture = Figure(layout="constrained")
        draw(picture)
        picture.savefig(folder / f"{name}.png", dpi=110)
        whole = {**self.about, "missed": self.missed, **self.data}
        (folder / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        page = folder / f"{name}.md"
        page.write_text(self._markdown(name), encoding="utf-8")
        return page

    def _markdown(self, name: str) -> str:
        about = self.about
        on = "; ".join(f"{what}: {value}" for what, value in about["machine"].items())
        lines = [
            f"# {self.title}",
            "",
            f"`{about['command']}`, seed {about['seed']}, {about['date']} on {about['label']}, commit "
            f"{about['commit'] or 'unknown'}.",
            f"{on}. Load before and after: {about['load before']}, {about['load after']}.",
            ", ".join(f"{what} {value}" for what, value in about["versions"].items()) + ".",
            f"Every number is in `{name}.json`." + (" A quick run: it measures little." if about["quick"] else ""),
            "",
            "; ".join(f"Missed: {one}" for one in self.missed) if self.missed else "Every goal was reached.",
            "",
            f"![{self.title}]({name}.png)",
        ]
        return "\n".join([*lines, *(f"\n{section.markdown()}" for section in self.sections)]) + "\n"


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """What all such commands are told."""
    made = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    made.add_argument("--quick", action="store_true", help="small and short: shows that all works, measures little")
    made.add_argument("--out", type=Path, help="where results go (benchmarks; bench-out where --quick is given)")
    made.add_argument("--directory", type=Path, default=_ROOT / "bench-out", help="data files (bench-out)")
    made.add_argument(
        "--label", default=platform.node() or "host", help="the machine's name in file names (%(default)s)"
    )
    made.add_argument("--seed", type=int, default=20260101, help="of every random number (%(default)s)")
    return made


def start(title: str, given: argparse.Namespace, program: str, words: Sequence[str] | None) -> tuple[Page, Context]:
    """A page for the parsed command line, and what its measurements are given; sets `given.out`."""
    given.out = given.out or _ROOT / ("bench-out" if given.quick else "benchmarks")
    given.directory.mkdir(parents=True, exist_ok=True)
    # Files are named without their folders, which are nobody's business.
    shown = [Path(word).name if "/" in word else word for word in (sys.argv[1:] if words is None else words)]
    about = {
        "format": "torchrec_turbossd sizing benchmark",
        "version": 1,
        "label": given.label,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", program, *shown]),
        "quick": given.quick,
        "seed": given.seed,
        "commit": machine.commit(),
        "machine": machine.describe(given.directory),
        "versions": machine.versions(),
        "load before": machine.load(),
    }
    page = Page(title, about)
    context = Context(
        quick=given.quick,
        directory=given.directory.resolve(),
        seed=given.seed,
        traces=tuple(getattr(given, "traces", ())),
        say=page.say,
    )
    return page, context


__all__ = ["Page", "Section", "parser", "start"]
