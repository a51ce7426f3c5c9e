"""The site of docs/: built without a warning, complete, and readable without a network."""

import html.parser
import os
import pathlib
import re
import subprocess
import sys

import pytest

import pfjax
from pfjax.trainer import metrics, settings
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("site")
    build = ["-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={folder}"]
    done = subprocess.run(
        [sys.executable, *build],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_setting_and_every_metric_has_its_line(site):
    for page, names in (
        ("settings.html", settings.SETTINGS),
        ("metrics.html", metrics.METRICS),
    ):
        content = (site / page).read_text()
        assert [x for x in names if f"<code>{x}</code>" not in content] == []


def test_the_api_has_every_name_that_pfjax_exports(site):
    content = (site / "api.html").read_text()
    names = [x for x in pfjax.__all__ if x != "losses"]
    assert [x for x in names if f"pfjax.{x}\n" not in content] == []


def test_pages_ask_nothing_of_the_net_and_leave_no_formula_in_latex(site):
    for page in site.rglob("*.html"):
        content = page.read_text()
        loaded = _Loaded()
        loaded.feed(content)
        assert loaded.remote == [], page.name
        assert "arithmatex" not in content, page.name


class _Loaded(html.parser.HTMLParser):
    """What a browser loads for a page from elsewhere; links do not count."""

    def __init__(self):
        super().__init__()
        self.remote: list[str] = []

    def handle_starttag(self, tag, attrs):
        address = dict(attrs).get("href" if tag == "link" else "src") or ""
        if tag in ("link", "script", "img", "iframe") and "//" in address:
            self.remote.append(address)


_PAGES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]


def test_settings_that_pages_name_are_there():
    for page in _PAGES:
        content = page.read_text()
        named = re.findall(r"--config\.([a-z][\w.]*\w)", content)
        # The first column of a table, a group.name.
        named += re.findall(
            r"^\| `((?:data|optim|lora|mesh)\.\w+)`", content, re.MULTILINE
        )
        assert [x for x in named if x not in settings.SETTINGS] == [], page.name


def test_files_that_pages_name_are_there():
    folders = "configs|docs|examples|launch|pfjax|tests"
    for page in _PAGES:
        named = re.findall(rf"`((?:{folders})/[\w./]+\.\w+)`", page.read_text())
        assert [x for x in named if not (ROOT / x).exists()] == [], page.name
