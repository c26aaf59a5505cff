"""The repository as the rule tests see it: its files, its package's modules, and what they import."""

from __future__ import annotations

import ast
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "torchrec_turbossd"
LINKED = ("planner", "sharding")
"""Top-level folders that are subpackages."""

_NOT_OURS = {".git", ".venv", ".gpu1", ".gpu2", "build", "dist", "demo-out", "bench-out", "__pycache__"}


def repository_files() -> list[Path]:
    """Files of the repository, links left out: git's list where there is one, else all but caches and builds."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if listed.returncode == 0:
            paths = [ROOT / name for name in listed.stdout.split("\0") if name]
            return sorted(p for p in paths if p.is_file() and not p.is_symlink())
    return sorted(_walked_files())


def _walked_files() -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            f for f in folders if f not in _NOT_OURS and not f.endswith((".egg-info", "_cache", ".hypothesis"))
        ]
        paths = [Path(folder) / name for name in names]
        found += [p for p in paths if p.is_file() and not p.is_symlink()]
    return found


def python_files() -> list[Path]:
    """Every Python file of the repository, each once."""
    return [p for p in repository_files() if p.suffix == ".py"]


def relative(path: Path) -> str:
    """A path as messages and test names show it."""
    return path.relative_to(ROOT).as_posix()


def package_modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package; a package's own name stands for its `__init__`."""
    modules = {}
    for path in python_files():
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[0] in LINKED:
            parts.insert(0, PACKAGE)
        if parts[0] == PACKAGE:
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def packages() -> list[str]:
    """Dotted names of the package and its subpackages."""
    return sorted(name for name, path in package_modules().items() if path.name == "__init__.py")


@dataclass(frozen=True)
class Import:
    """One imported name: `import a.b` is ("a.b", None); `from a import b` is ("a", "b")."""

    module: str
    name: str | None
    line: int
    at_import: bool
    """Runs when the module is imported: not inside a function, nor for type checkers alone."""

    def target(self, modules: dict[str, Path]) -> str:
        """The module that this depends on: `a.b` where that is a module of the package, else `a`."""
        whole = f"{self.module}.{self.name}"
        return whole if whole in modules else self.module


def imports_of(source: str) -> list[Import]:
    """All imports of a module, wherever they stand."""
    return _imports(ast.parse(source), at_import=True)


def _imports(node: ast.AST, *, at_import: bool) -> list[Import]:
    found: list[Import] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [Import(a.name, None, child.lineno, at_import) for a in child.names]
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            found += [Import(module, a.name, child.lineno, at_import) for a in child.names]
        else:
            found += _imports(child, at_import=at_import and not _runs_later(child))
    return found


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
