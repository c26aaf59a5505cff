"""The demo runs to its end, every check holds, and it leaves what it promises and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--steps", "6", "--batch-size", "64", "--ranks", "2"]
CHECKS = 13


def run_demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=out.parent, timeout=240)


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    out, ssd = tmp_path / "out", tmp_path / "ssd"
    done = run_demo(out, *TINY, "--budget-mb", "24", "--ssd-directory", str(ssd))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == {"demo.png", "figures.json"}, "scratch files are left behind"
    assert not list(ssd.iterdir()), "live tables are left behind"
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "figures.json").read_text())
    assert len(report["checks"]) == CHECKS
    assert all(check["held"] for check in report["checks"])
    assert "largest difference of 20 losses: 0" in [check["compared"] for check in report["checks"]]
    assert "2 x 24 MiB" in report["figures"]["memory budget for them"]
    assert "Every check held" in done.stdout


@pytest.mark.slow
def test_a_budget_that_holds_nothing_is_refused_in_one_line(tmp_path: Path) -> None:
    done = run_demo(tmp_path / "out", *TINY, "--budget-mb", "2")
    assert done.returncode == 1
    assert "no plan fits" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not list((tmp_path / "out").iterdir())
