"""No file of the repository speaks of one machine's folders, or leaves work for later."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.rules.tree import relative, repository_files

# Put together from pieces, so that this file passes its own test.
FORBIDDEN = {
    "a folder of one machine": re.compile(r"(?<![\w.~\-/])/wo" + r"rk/|\.\./sha" + r"red\b"),
    "work left for later": re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b"),
}


def text_faults(text: str) -> list[str]:
    """Lines that hold what no file may."""
    return [
        f"line {number}: {what}: {line.strip()[:100]}"
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in FORBIDDEN.items()
        if pattern.search(line)
    ]


def read_text(path: Path) -> str | None:
    """The text of a file, or None for a binary one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


@pytest.mark.parametrize("path", repository_files(), ids=relative)
def test_text(path: Path) -> None:
    faults = text_faults(read_text(path) or "")
    assert not faults, "\n".join(faults)


def test_planted_faults_are_found() -> None:
    planted = ["open('/wo" + "rk/x')", "cp ../sha" + "red/x .", "# TO" + "DO later", "x  # FIX" + "ME"]
    assert all(text_faults(line) for line in planted)
    assert not text_faults("artwork/x, https://example.org/wo" + "rk/x, shared/x, TODOS")
