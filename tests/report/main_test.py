"""python -m pfjax.report, as a person runs it, and the page in a browser."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.evaluation import fake_runs

ROOT = pathlib.Path(__file__).parent.parent


def _run(*args, cwd):
    return subprocess.run(
        [sys.executable, "-m", "pfjax.report", *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> pathlib.Path:
    """The page of 3 runs in 2 groups, with long, hostile and empty responses."""
    folder = tmp_path_factory.mktemp("report")
    texts = {
        "3": "<script>alert(1)</script>",
        "4": "\\frac{1}{2} " * 400,
        None: "",
        "9": "unbroken" * 60,
    }
    fake_runs.make(folder / "runs/a", 0, fake_runs.SEED_0, texts)
    fake_runs.make(folder / "runs/b", 1, fake_runs.SEED_1, texts)
    long = {"train": "folder/" + "unbroken" * 20}
    flat = fake_runs.make(
        folder / "runs/c", 0, fake_runs.SEED_1, texts, alpha=0.5, data=long
    )
    (flat / "label.txt").write_text("flat & wide\n")
    done = _run("runs", "--out=out", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out/index.html: 3 run(s) in 2 group(s)\n"
    assert done.stderr == ""
    return folder / "out/index.html"


def test_the_page_holds_all_parts_in_order(page):
    text = page.read_text()
    assert "<h1>What training changed in pfjax/toy</h1>" in text
    assert "3 training runs of pfjax, evaluated before training (step 0)" in text
    assert "on 2 held-out prompts with 2 samples each" in text
    assert ">python -m pfjax.report runs --out=out</pre>" in text
    assert "Begun 2026-11-24. pfjax 0.1.0, jax 0.10.2" in text
    headings = re.findall(r"<h2>(.+?)</h2>", text)
    assert headings == [
        "First and last evaluation",
        "Over the steps of training",
        "More samples, more variety",
        "Before and after",
        "Which problems changed",
        "Settings",
    ]
    names = re.findall(r'<figure id="(.+?)">', text)
    assert names == [
        "accuracy", "length", "distinct", "entropy", "residual", "pass", "quality"
    ]  # fmt: skip
    for name in names:
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("<svg") == 2 * len(names)


def test_its_numbers_are_right(page):
    text = page.read_text()
    row = text[text.index("powerflow, alpha 4") : text.index("flat &amp; wide")]
    assert "seeds 0, 1 · step 0" in row
    # avg@2: 1/4 and 1/2, then 3/4 and 1 (tests/evaluation/fake_runs.py).
    cell = re.search(r'data-label="avg@2">(.+?)</td>', row)[1]
    assert re.sub(r"<[^>]+>", "", cell) == "0.375 ±.177→ 0.875 ±.177"
    cell = re.search(r'data-label="length">(.+?)</td>', row)[1]
    assert re.sub(r"<[^>]+>", "", cell) == "10.0 ±.0→ 14.0 ±.0"
    moved = text[text.index('<section id="moved">') :]
    gained = re.findall(r'data-label="wrong → right">(.+?)<', moved)
    rose = re.findall(r'data-label="share rose">(.+?)<', moved)
    assert gained == ["1", "1"] and rose == ["1.5", "1"]


def test_nothing_runs_and_nothing_is_fetched(page):
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    outside = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[^"]+"', "", text)
    assert not re.findall(r"https?:|\bsrc=|@import", outside)


def test_the_same_runs_give_the_same_bytes(page, tmp_path):
    shutil.copytree(page.parent.parent / "runs", tmp_path / "runs")
    assert _run("runs", "--out=out", cwd=tmp_path).returncode == 0
    for path in sorted(page.parent.iterdir()):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path


def test_mistakes_are_one_line(tmp_path):
    fake_runs.make(tmp_path / "silent", answers={})
    (tmp_path / "file").touch()
    fake_runs.make(tmp_path / "good")
    for args, message in [
        ((), "give at least one run"),
        (("absent",), "absent holds no run"),
        (("silent",), "silent holds 1 run but no evaluation"),
        (("good", "--out=file"), "file"),
    ]:
        done = _run(*args, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and message in done.stderr


def test_nothing_else_pays_for_the_drawing():
    code = "import sys, pfjax.trainer.loop; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@contextlib.contextmanager
def _browser(folder: pathlib.Path, width: int, height: int):
    """Chromium through the W3C protocol: yields a function that sends commands."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def call(method: str, path: str, body=None):
        data = None if body is None else json.dumps(body).encode()
        url = f"http://localhost:{port}{path}"
        request = urllib.request.Request(url, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--hide-scrollbars"
    )
    options = {
        "args": [*flags.split(), f"--user-data-dir={folder / 'profile'}"],
        "mobileEmulation": {
            "deviceMetrics": {"width": width, "height": height, "pixelRatio": 1}
        },
    }
    wanted = {
        "browserName": "chrome",
        "goog:chromeOptions": options,
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    try:
        for _ in range(100):
            with contextlib.suppress(urllib.error.URLError):
                call("GET", "/status")
                break
            time.sleep(0.1)
        found = call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        session = f"/session/{found['sessionId']}"
        try:
            yield lambda path, body: call("POST", session + path, body)
        finally:
            call("DELETE", session)
    finally:
        driver.terminate()
        driver.wait(timeout=30)


_LOOK = """
const shown = [...document.querySelectorAll('figure')].map(f => {
  const svgs = [...f.querySelectorAll('svg')].map(s => s.getBoundingClientRect());
  return svgs.filter(r => r.width > 200 && r.height > 100 && r.right <= innerWidth).length;
});
document.querySelectorAll('details').forEach(d => d.open = true);
return {shown: shown, wide: document.documentElement.scrollWidth, inner: innerWidth,
        outside: [...document.querySelectorAll('main *:not(svg *)')].filter(
          e => e.getBoundingClientRect().right > innerWidth + 1
               && !e.closest('.table')).length,
        cut: [...document.querySelectorAll('.table')].filter(
          e => e.scrollWidth > e.clientWidth + 1).length};
"""


@pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium")),
    reason="needs chromium and chromedriver",
)
@pytest.mark.parametrize("width", [360, 390, 1200])
def test_in_a_browser(page, tmp_path, width):
    with _browser(tmp_path, width, 900) as send:
        send("/url", {"url": page.resolve().as_uri()})
        seen = send("/execute/sync", {"script": _LOOK, "args": []})
        assert seen["shown"] == [1] * 7  # of the two sizes of each picture one
        assert seen["inner"] == seen["wide"] == width
        assert seen["outside"] == seen["cut"] == 0
        assert send("/se/log", {"type": "browser"}) == []
