"""The report of the GPU benchmark: written anew after every row, so that a run that is cut short loses nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Goal, number
from benchmarks.report import Report

_FORMAT = "torchrec_turbossd GPU benchmark"
_KERNELS = 16
"""The longest kernels, told on the page; all are in the JSON file."""


def figure_from(whole: dict[str, Any]) -> Figure:
    """What `Figure.to_json` wrote."""
    goal = whole.get("goal")
    known = {each.name: whole[each.name] for each in fields(Figure) if each.name in whole}
    if goal is not None:
        known["goal"] = Goal(at_most=goal["at_most"], reach=goal["reach"], aim=goal["aim"])
    return Figure(**known)


@dataclass
class GpuReport(Report):
    """Collects figures and writes them as `stem`.json, .md and, with matplotlib, .png in `folder`.

    Attributes:
        picture: whether there is one.
    """

    folder: Path = Path()
    stem: str = "gpu"
    picture: bool = False

    def resume(self, file: Path) -> None:
        """Go on with what an earlier process wrote, in its files."""
        whole = json.loads(file.read_text(encoding="utf-8"))
        self.figures = [figure_from(each) for each in whole["figures"]]
        self.seconds = dict(whole["seconds"])
        self.about["command"] = whole["command"]
        self.folder, self.stem = file.parent, file.stem

    def write(self) -> Path:
        """Write all files; returns the page."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._replace(f"{self.stem}.json", self.to_json(_FORMAT))
        return self._replace(f"{self.stem}.md", self.markdown(f"{self.stem}.json"))

    def _replace(self, name: str, text: str) -> Path:
        """In one step, so that a run that ends here leaves the file of the row before."""
        temporary, path = self.folder / f".{name}.new", self.folder / name
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        return path

    def draw(self) -> None:
        """The picture of everything with points; none without matplotlib or points."""
        points = [point for figure in self.figures for point in figure.details.get("points", ())]
        if points:
            self.picture = draw(points, self.folder / f"{self.stem}.png", self.about["label"])

    def markdown(self, data: str) -> str:
        about = self.about
        machine = "; ".join(f"{name}: {value}" for name, value in about["machine"].items())
        versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
        seconds = ", ".join(f"{row} {spent:.0f}" for row, spent in self.seconds.items())
        lines = [
            f"# GPU benchmarks on {about['label']}, {about['date']}",
            "",
            f"`{about['command']}`, seed {about['seed']}, commit {about['commit'] or 'unknown'}.",
            f"{machine}.",
            f"{versions}.",
            "",
            "Ours and the peers ran in turns in one run on the same batches, timed by CUDA events; a ratio is the",
            "median of the rounds' ratios. But for the row `ssd` the store behind is in memory, and warming up leaves",
            f"none of its rows to the timed batches. Everything measured is in `{data}`."
            + (" A quick run: its figures mean little." if about["quick"] else ""),
            "",
            f"Seconds by row: {seconds}." if seconds else "Nothing has been measured yet.",
        ]
        if self.picture:
            lines += ["", f"![Time of a batch]({self.stem}.png)"]
        for row in dict.fromkeys(figure.row for figure in self.figures):
            lines += ["", f"## {row}", "", f"{about['rows'].get(row, row)}.", "", *self._table(row)]
            for figure in self.figures:
                if figure.row == row and "kernels" in figure.details:
                    lines += ["", *kernel_table(figure)]
        return "\n".join(lines) + "\n"


def kernel_table(figure: Figure) -> list[str]:
    """Kernels of a profile, the longest first."""
    kernels = figure.details["kernels"]
    whole = sum(kernel["us"] for kernel in kernels) or 1.0
    lines = [
        f"Kernels of {figure.case.split(':')[0]}:",
        "",
        "| kernel | part | calls | us | share |",
        "|---|---|---|---|---|",
    ]
    for kernel in kernels[:_KERNELS]:
        cells = (kernel["name"], kernel["part"], f"{kernel['calls']:.3g}", number(kernel["us"]))
        lines.append(f"| {' | '.join(cells)} | {kernel['us'] / whole:.1%} |")
    if rest := kernels[_KERNELS:]:
        spent = sum(kernel["us"] for kernel in rest)
        lines.append(f"| {len(rest)} more | | | {number(spent)} | {spent / whole:.1%} |")
    return lines


def draw(points: list[dict[str, Any]], path: Path, label: str) -> bool:
    """One panel for each kind of points, one line for each of their names; False without matplotlib."""
    try:
        from matplotlib.figure import Figure as Picture
    except ImportError:
        return False
    panels = list(dict.fromkeys(point["panel"] for point in points))
    picture = Picture(figsize=(11, 4 * -(-len(panels) // 2)), layout="constrained")
    picture.suptitle(f"Milliseconds of a batch on {label}")
    for place, panel in enumerate(panels):
        axes = picture.add_subplot(-(-len(panels) // 2), 2, place + 1)
        here = [point for point in points if point["panel"] == panel]
        for line in dict.fromkeys(point["line"] for point in here):
            dots = dict(sorted((point["x"], point["ms"]) for point in here if point["line"] == line))
            style = "--" if not line.startswith("ours") else "-"
            axes.plot(list(dots), list(dots.values()), style, marker="o", markersize=3, label=line)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(panel)
        axes.set_ylabel("ms")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    picture.savefig(path, dpi=110)
    return True


__all__ = ["GpuReport", "draw", "figure_from", "kernel_table"]
