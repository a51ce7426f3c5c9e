"""What the docs mark to be run does. README.md: smoke_test.py."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
from typing import NamedTuple

import pytest

from tests.conftest import ROOT


class Block(NamedTuple):
    language: str
    text: str


def blocks_to_run(path: pathlib.Path) -> list[Block]:
    """The code of a Markdown file that stands below `<!-- run -->`, in order."""
    found = re.findall(
        r"^<!-- run -->\n+```(\w+)\n(.*?)^```",
        path.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    return [Block(*x) for x in found]


def run_block(block: Block, folder: pathlib.Path, **env: str) -> str:
    """Runs code in a folder and returns what it prints; raises where a line fails.

    Of bash every line has to succeed. Python is that of `.venv` there, if there is one.
    """
    python = folder / ".venv/bin/python"
    command = {
        "bash": ["bash", "-euo", "pipefail", "-c", block.text],
        "python": [
            str(python if python.exists() else sys.executable),
            "-c",
            block.text,
        ],
    }[block.language]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | env,
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_checkout(folder: pathlib.Path) -> None:
    """A fresh checkout, with an environment that stands for the one it would make."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    _make_environment(folder)


def _make_environment(folder: pathlib.Path) -> None:
    """`.venv` with the packages of the tests, and pfjax as `pip install -e` puts it."""
    venv = folder / ".venv"
    subprocess.check_call([sys.executable, "-m", "venv", "--without-pip", str(venv)])
    (packages,) = venv.glob("lib/python*/site-packages")
    ours = [str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    (packages / "pfjax.pth").write_text("\n".join(ours) + "\n")
    command = venv / "bin/pfjax"
    # Of a path with spaces the first line cannot name the interpreter.
    first = f"#!/bin/sh\n'''exec' '{venv}/bin/python' \"$0\" \"$@\"\n' '''\n"
    command.write_text(f"{first}from pfjax.__main__ import main\nmain()\n")
    command.chmod(0o755)
    # launch/environment.sh finds that it has been here already.
    stamp = (
        "source launch/environment.sh; "
        'cat setup.py launch/constraints.txt - <<<"$(accelerator) $PWD" | cksum '
        ">.venv/.pfjax-ready"
    )
    subprocess.check_call(["bash", "-c", stamp], cwd=folder)


_PAGES = [p for p in sorted(ROOT.glob("docs/**/*.md")) if blocks_to_run(p)]


@pytest.mark.parametrize("page", _PAGES, ids=lambda p: p.stem)
def test_what_a_page_of_the_docs_marks_to_be_run_works(page, tmp_path):
    for block in blocks_to_run(page):
        run_block(block, tmp_path, PYTHONPATH=str(ROOT))


def test_commands_are_run_only_where_the_page_says_so(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\nnot this\n```\n<!-- run -->\n```bash\necho this\n```\n"
        "<!-- run -->\n```python\nx = 1\nprint(x)\n```\n"
    )
    blocks = blocks_to_run(page)
    assert blocks == [
        Block("bash", "echo this\n"),
        Block("python", "x = 1\nprint(x)\n"),
    ]
    assert [run_block(b, tmp_path) for b in blocks] == ["this\n", "1\n"]
    with pytest.raises(AssertionError, match="false"):
        run_block(Block("bash", "false\ntrue\n"), tmp_path)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
