"""What is installed is what is in the tree: each file once, under the right name, importable."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import torchrec_turbossd
from tests.rules.tree import LINKED, PACKAGE, ROOT, package_modules, packages, relative, repository_files

IMPORT_ALL = """
import importlib, pathlib, sys
site = pathlib.Path(sys.argv[1]).resolve()
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert site in pathlib.Path(module.__file__).resolve().parents, (name, module.__file__)
"""


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def words(value: str) -> list[str]:
    """The entries of a setup.cfg list, without its comments."""
    return [line.strip() for line in value.splitlines() if line.strip()]


def packed_name(path: Path) -> str:
    """The name that a source file of the package has in a wheel."""
    name = relative(path)
    return f"{PACKAGE}/{name}" if name.split("/")[0] in LINKED else name


def test_packages_are_the_tree() -> None:
    listed = words(setup_cfg()["options"]["packages"])
    folders = {name.rpartition(".")[0] for name, path in package_modules().items() if path.name != "__init__.py"}
    assert sorted(listed) == packages(), "setup.cfg's packages differ from the folders with an __init__.py"
    assert folders <= set(listed), "a folder with modules lacks an __init__.py"


def test_package_dir_maps_the_linked_folders() -> None:
    pairs = dict(line.split(" = ") for line in words(setup_cfg()["options"]["package_dir"]))
    assert pairs == {PACKAGE: PACKAGE} | {f"{PACKAGE}.{name}": name for name in LINKED}


@pytest.mark.parametrize("name", LINKED)
def test_links_exist(name: str) -> None:
    link = ROOT / PACKAGE / name
    assert link.is_symlink(), f"{relative(link)} must be a link to ../{name}"
    assert os.readlink(link) == f"../{name}"


def test_version_is_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{torchrec_turbossd.__version__}]" in text


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of a copy of the tree, and a wheel built from that sdist."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in repository_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    for name in LINKED:
        (source / PACKAGE / name).symlink_to(f"../{name}")
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", str(out)]
    built = subprocess.run([*command, str(source)], cwd=out, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.mark.slow
def test_wheel_holds_each_module_once(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    held = Counter(n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n)
    wanted = {packed_name(p) for p in package_modules().values()} | {f"{PACKAGE}/py.typed"}
    assert held == Counter(wanted)


@pytest.mark.slow
def test_sdist_holds_each_file_once(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = Counter(m.name.partition("/")[2] for m in archive.getmembers() if m.isfile())
    modules = {relative(p) for p in package_modules().values()}
    tests = {relative(p) for p in repository_files() if p.parts[len(ROOT.parts)] == "tests" and p.suffix == ".py"}
    wanted = modules | tests | {"LICENSE", "README.md", "setup.cfg", "pyproject.toml", f"{PACKAGE}/py.typed"}
    assert wanted <= set(held)
    doubled = [n for n in held if held[n] > 1 or n.startswith(tuple(f"{PACKAGE}/{link}/" for link in LINKED))]
    assert not doubled


@pytest.mark.slow
def test_wheel_imports_from_a_clean_folder(distributions: Path, tmp_path: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    names = sorted(name for name in package_modules() if not name.endswith("__main__"))
    env = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", IMPORT_ALL, str(site), *names]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
