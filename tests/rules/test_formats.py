"""Every format on disk has a page that names it and its version."""

from __future__ import annotations

import re

import pytest

from tests.rules.tree import ROOT
from torchrec_turbossd.serving import generations
from torchrec_turbossd.snapshot import manifest
from torchrec_turbossd.store import directory, flat, journal, layered_form

FORMATS = [
    (module.FORMAT, module.FORMAT_VERSION) for module in (directory, flat, journal, layered_form, manifest, generations)
]


@pytest.mark.parametrize(("name", "version"), FORMATS)
def test_a_page_names_the_format_and_its_version(name: str, version: int) -> None:
    pages = " ".join(" ".join(p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("docs/formats/*.md"))).split())
    assert re.search(rf'"{re.escape(name)}".{{0,30}}`format_version` [(|] ?{version}\b', pages)
