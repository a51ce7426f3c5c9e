"""python -m pfjax.report: the page, its numbers, and what others wrote in it."""

import html.parser
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from pfjax.report import page, runs
from tests.report import fake_runs

ROOT = pathlib.Path(__file__).parents[2]
EVIL = "<script>alert(1)</script>\"'&"


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> pathlib.Path:
    """The page of 3 runs in 2 groups, with long, hostile and empty responses."""
    folder = tmp_path_factory.mktemp("report")
    texts = {
        "3": EVIL, "4": "\\frac{1}{2} " * 400, None: "", "9": "unbroken" * 60
    }  # fmt: skip
    fake_runs.make(folder / "runs/a", 0, fake_runs.SEED_0, texts)
    fake_runs.make(folder / "runs/b", 1, fake_runs.SEED_1, texts)
    data = {"train": EVIL + "folder/" + "unbroken" * 20}
    flat = fake_runs.make(
        folder / "runs/c", 0, fake_runs.SEED_1, texts, alpha=0.5, data=data
    )
    (flat / "label.txt").write_text(f"flat & wide {EVIL}\n")
    said = page.write([str(folder / "runs")], str(folder / "out"), f"report {EVIL}")
    assert said == f"{folder}/out/index.html: 3 run(s) in 2 group(s)"
    return folder / "out/index.html"


class _Tags(html.parser.HTMLParser):
    """Lists tags, and sees that they close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.seen, self._open = [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "link", "br", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


def test_the_page_holds_all_parts_in_order(index):
    text = index.read_text()
    assert "<h1>What training changed in pfjax/toy</h1>" in text
    assert "3 training runs of pfjax, evaluated on 2 held-out prompts" in text
    assert "with 2 samples each" in text and "pfjax 0.1.0, jax 0.10.2" in text
    assert re.findall(r"<h2>(.+?)</h2>", text) == [
        "First and last evaluation", "Pictures", "Before and after", "Settings"
    ]  # fmt: skip
    names = re.findall(r'<figure id="(.+?)">', text)
    assert names == [
        "accuracy", "length", "distinct", "entropy", "residual", "pass", "quality"
    ]  # fmt: skip
    for name in names:
        assert (index.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert text.count('src="data:image/svg+xml;base64,') == len(names)


def test_its_numbers_are_right(index):
    text = index.read_text()
    row = text[text.index(">powerflow, alpha 4") : text.index(">flat &amp; wide")]
    assert "seeds 0, 1 · step 0 → 4" in row
    # avg@2: 1/4 and 1/2, then 3/4 and 1 (tests/report/fake_runs.py).
    cell = re.search(r'data-label="avg@2">(.+?)</td>', row, re.DOTALL)[1]
    assert _words(cell) == "0.375 ±0.177 → 0.875 ±0.177"
    cell = re.search(r'data-label="length">(.+?)</td>', row, re.DOTALL)[1]
    assert _words(cell) == "10.0 ±0.0 → 14.0 ±0.0"
    # One problem of two, in both seeds.
    assert "by majority 1 became correct, 0 incorrect" in text
    # The label names the group, so that what is set alike is told below.
    assert '<td data-label="alpha">0.5</td>' in text
    assert "<dt>optim.learning_rate</dt><dd>0.001</dd>" in text


def _words(cell: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", cell).split())


def test_nothing_that_others_wrote_is_markup_and_nothing_is_fetched(index):
    text = index.read_text()
    tags = _Tags(text)
    assert "script" not in tags.seen and "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;") >= 4
    outside = re.sub(r'src="data:[^"]+"', "", text)
    assert not re.findall(r"https?:|src=|@import|url\(", outside)
    assert 'name="viewport" content="width=device-width' in text


def test_samples_say_correct_and_incorrect_in_words(index):
    text = index.read_text()
    shown = text[text.index('<section id="samples">') : text.index('id="settings"')]
    # Of seed 0, problem 1: answers 4 and none, then 9 (correct) and 4.
    assert "correct answer 9 · correct in 0 of 2 samples → 1 of 2" in shown
    first = shown[shown.index("problem 1") :]
    first = _words(first[: first.index("</article>")])
    assert "before (step 0) ✗ incorrect · sample 0, 5 tokens" in first
    assert "after (step 4) ✓ correct · sample 0, 5 tokens" in first


def test_long_texts_are_folded_and_whole(index):
    text = index.read_text()
    whole = "\\frac{1}{2} " * 400
    assert f"<pre>\n{whole}</pre>\n</details>" in text
    assert '<details class="long"><summary>\\frac{1}{2}' in text


def test_values():
    assert page._number(0.98999, 3) == "0.990"
    assert page._number(-0.0001, 3) == "0.000"
    assert page._number(-1.5, 1) == "−1.5"
    assert page._number(951.04, 1) == "951"
    assert page._number(1234.56, 3) == "1234.6"


def test_what_only_one_seed_knows_has_no_column(tmp_path):
    for seed in (0, 1):
        fake_runs.make(tmp_path / str(seed), seed)
    groups = runs.group(runs.load([str(tmp_path)])[0])
    assert "entropy" in [c["title"] for c in page._columns(groups)]
    for row in groups[0].runs[0].rows:
        row.pop("entropy", None)
    assert "entropy" not in [c["title"] for c in page._columns(groups)]


def test_without_answers_nothing_is_called_correct(tmp_path):
    texts = {a: "" for a in ("3", "4")} | {"9": "half \udcff\0"}
    fake_runs.make(tmp_path / "a", texts=texts, is_graded=False)
    page.write([str(tmp_path / "a")], str(tmp_path / "out"))
    text = (tmp_path / "out/index.html").read_text()
    body = text[text.index("<body>") :]
    assert "The first prompts, and the first sample of each" in body
    assert "✓" not in body and "✗" not in body and "majority" not in body
    assert '<pre class="none">(empty)</pre>' in body
    assert "Not drawn, as too little is known: Accuracy, pass@n." in body


def test_the_same_runs_give_the_same_bytes(index, tmp_path):
    shutil.copytree(index.parents[1] / "runs", tmp_path / "runs")
    page.write([str(tmp_path / "runs")], str(tmp_path / "out"), f"report {EVIL}")
    for path in sorted(index.parent.iterdir()):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path


def _run(*args, cwd):
    return subprocess.run(
        [sys.executable, "-m", "pfjax.report", *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_writes_the_page_and_mistakes_are_one_line(tmp_path):
    fake_runs.make(tmp_path / "good")
    (tmp_path / "file").touch()
    done = _run("good", "--out=out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "out/index.html: 1 run(s) in 1 group(s)\n"
    text = (tmp_path / "out/index.html").read_text()
    assert ">pfjax report good --out=out</pre>" in text
    for args, message in [
        ((), "give at least one run"),
        (("good", "--out=file"), "file"),
    ]:
        done = _run(*args, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and message in done.stderr


def test_nothing_else_pays_for_the_drawing():
    code = "import sys, pfjax.trainer.loop; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# What a person sees of the page, told to the frame that it is shown in.
_LOOK = """<script>
addEventListener('load', () => {
  const seen = [...document.images].filter(i => {
    const box = i.getBoundingClientRect();
    return i.naturalWidth > 200 && box.width > 200 && box.height > 100
      && box.right <= innerWidth;
  }).length;
  document.querySelectorAll('details').forEach(d => d.open = true);
  parent.postMessage(JSON.stringify([
    seen, innerWidth, document.documentElement.scrollWidth,
    [...document.querySelectorAll('main *')].filter(
      e => e.getBoundingClientRect().right > innerWidth + 1
           && !e.closest('.table')).length,
    [...document.querySelectorAll('.table')].filter(
      e => e.scrollWidth > e.clientWidth + 1).length]), '*');
});
</script></body>"""
# A frame, as windows have a least width.
_FRAME = """<!DOCTYPE html><title>nothing</title>
<script>addEventListener('message', e => document.title = e.data)</script>
<iframe src="index.html" width="{width}" height="900" style="border: 0"></iframe>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [360, 390, 1200])
def test_in_a_browser(index, tmp_path, width):
    text = index.read_bytes().replace(b"</body>", _LOOK.encode())
    (tmp_path / "index.html").write_bytes(text)
    (tmp_path / "frame.html").write_text(_FRAME.format(width=width))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--no-first-run", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--window-size=1300,900", "--dump-dom",
         (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    # All 7 pictures, no wider than the screen; nothing outside, no table cut.
    assert f"<title>[7,{width},{width},0,0]</title>" in done.stdout
    assert "CONSOLE" not in done.stderr
