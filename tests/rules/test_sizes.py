"""Files and functions stay short, and every module that holds anything opens with its docstring."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.rules.tree import python_files, relative

FILE_LINES = 400
FUNCTION_LINES = 60


def size_faults(source: str) -> list[str]:
    """What is too long in a module, or missing at its top."""
    faults = []
    tree = ast.parse(source)
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        faults.append(f"{lines} lines, at most {FILE_LINES}: split the file")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                faults.append(f"line {node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES}")
    if source.strip() and not (ast.get_docstring(tree) or "").strip():
        faults.append("no module docstring first")
    return faults


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_sizes(path: Path) -> None:
    faults = size_faults(path.read_text(encoding="utf-8"))
    assert not faults, "\n".join(faults)


def test_planted_faults_are_found() -> None:
    body = "    pass\n" * FUNCTION_LINES
    assert size_faults('"""Doc."""\n') == size_faults("") == []
    assert size_faults("import os\n") == ["no module docstring first"]
    assert size_faults(f'"""Doc."""\ndef f():\n{body[:-9]}') == []
    assert "f has 61 lines" in size_faults(f'"""Doc."""\ndef f():\n{body}')[0]
    assert "401 lines" in size_faults('"""Doc."""' + "\n\n" * 200 + "x = 1\n")[0]
