"""pfjax report: the page, its numbers, and what others wrote in it."""

import html.parser
import json
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
TEXTS = {
    "3": EVIL, "4": "so \\(\\frac{1}{2}\\) costs $3 or $4 " * 90, None: "",
    "9": "unbroken" * 60 + "</script><!--<script>"
}  # fmt: skip


def make_page(folder: pathlib.Path) -> pathlib.Path:
    """The page of 3 runs in 2 groups, with long, hostile and empty responses."""
    fake_runs.make(folder / "runs/a", 0, fake_runs.SEED_0, TEXTS)
    fake_runs.make(folder / "runs/b", 1, fake_runs.SEED_1, TEXTS)
    data = {"train": EVIL + "folder/" + "unbroken" * 20}
    flat = fake_runs.make(
        folder / "runs/c", 0, fake_runs.SEED_1, TEXTS, alpha=0.5, data=data
    )
    (flat / "label.txt").write_text(f"flat & wide {EVIL}\n")
    said = page.write([str(folder / "runs")], str(folder / "out"), f"report {EVIL}")
    assert said == f"{folder}/out/index.html: 3 run(s) in 2 group(s)"
    return folder / "out/index.html"


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> pathlib.Path:
    return make_page(tmp_path_factory.mktemp("report"))


class _Tags(html.parser.HTMLParser):
    """Lists tags, and sees that they close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.seen, self.sources, self._open = [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "link", "br", "img", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


def _words(cell: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", cell).split())


def test_the_page_holds_all_parts_in_order(index):
    text = index.read_text()
    assert "<h1>What training changed in pfjax/toy</h1>" in text
    assert "3 training runs of pfjax in 2 groups" in text
    assert "evaluated on 2 held-out prompts with 2 samples each" in text
    assert re.findall(r"<h2>(.+?)</h2>", text) == [
        "Curves", "Runs", "Completions", "Settings"
    ]  # fmt: skip
    assert re.findall(r'<figure id="(.+?)">', text) == [
        "accuracy", "length", "distinct", "entropy", "residual", "pass", "quality"
    ]  # fmt: skip


def test_its_numbers_are_right(index):
    text = index.read_text()
    table = text[text.index("<table") : text.index("</table>")]
    head = [_words(x) for x in re.findall(r"<th scope=\"col\".+?</th>", table)]
    rows = re.findall(r"<tr><th scope=\"row\".+?</tr>", table, re.DOTALL)
    cells = [
        dict(zip(head[1:], re.findall("<td.+?</td>", r), strict=True)) for r in rows
    ]
    # avg@2: 1/4 and 1/2, then 3/4 and 1 (tests/report/fake_runs.py).
    assert _words(cells[0]["avg@2"]) == "0.875 ±0.177 +0.500"
    assert _words(cells[0]["length"]) == "14.0 ±0.0 +4.0"
    assert "seeds 0, 1 · step 4" in rows[0]
    # 1/2, then 1: the best.
    assert _words(cells[1]["avg@2"]) == "1.000 +0.500"
    assert 'class="best"' in cells[1]["avg@2"] and "best" not in cells[0]["avg@2"]
    assert "best" not in cells[0]["length"] + cells[1]["length"]


def test_settings_are_those_that_differ(index):
    text = index.read_text()
    table = text[text.rindex("<table") : text.rindex("</table>")]
    head = [_words(x) for x in re.findall(r"<th scope=\"col\".+?</th>", table)]
    assert head == ["run", "alpha", "data.train"]
    assert "<dt>optim.learning_rate</dt><dd>0.001</dd>" in text


def test_nothing_that_others_wrote_is_markup_and_nothing_is_fetched(index):
    text = index.read_text()
    tags = _Tags(text)
    ours = ["data", "samples", "uPlot", "katex", "charts", "table", "math", "browser"]
    assert tags.seen.count("script") == len(ours)
    assert tags.sources == ["data:,"]
    own = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "alert(1)</script>" not in own
    assert own.count("&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;") >= 4
    assert not re.findall(r"https?:|@import", own)
    assert not re.findall(r"url\((?!data:)", text)
    assert 'name="viewport" content="width=device-width' in text
    assert "default-src &#39;none&#39;" in own or "default-src 'none'" in own


def test_the_page_is_small_and_without_latex_smaller(index, tmp_path):
    assert index.stat().st_size < 1_000_000
    fake_runs.make(
        tmp_path / "a", texts={a: str(a) for a in ("3", "4", "7", "9", None)}
    )
    page.write([str(tmp_path / "a")], str(tmp_path / "out"))
    text = (tmp_path / "out/index.html").read_text()
    assert len(text) < 120_000 and "KaTeX_Main" not in text


def test_numbers():
    assert page._number(0.98999, 3) == "0.990"
    assert page._number(-0.0001, 3) == "0.000"
    assert page._number(-1.5, 1) == "−1.5"
    assert page._number(0.25, 3, "+") == "+0.250"
    assert page._number(-0.0001, 3, "+") == "0.000"
    assert page._number(951.04, 1) == "951"
    assert page._number(1234.56, 3) == "1234.6"


def test_what_only_one_seed_knows_has_no_column(tmp_path):
    for seed in (0, 1):
        fake_runs.make(tmp_path / str(seed), seed)
    groups = runs.group(runs.load([str(tmp_path)]))
    assert "entropy" in [c["title"] for c in page._columns(groups)]
    for row in groups[0].runs[0].rows:
        row.pop("entropy", None)
    assert "entropy" not in [c["title"] for c in page._columns(groups)]


def test_what_runs_took(tmp_path):
    folder = fake_runs.make(tmp_path / "a")
    about = json.loads((folder / "config.json").read_text())
    about["versions"] |= {"backend": "TPU v5e", "devices": "8"}
    (folder / "config.json").write_text(json.dumps(about))
    (run,) = runs.load([str(folder)])
    for row in run.rows:
        row |= {"time/step": 900.0, "perf/tokens_per_s": 1000.0 + row["step"]}
    run.rows[4] |= {"time/eval": 900.0}
    costs = {c["title"]: c["cells"][0]["text"] for c in page._costs(runs.group([run]))}
    assert costs == {"tokens/s": "1,002", "time": "1.5 h", "devices": "8 x TPU v5e"}


def test_runs_without_evaluation_without_completions_and_just_begun(tmp_path):
    fake_runs.make(tmp_path / "bare", answers={})
    bare = page.render(runs.load([str(tmp_path / "bare")]))
    assert '<figure id="entropy">' in bare and "hold no completions" in bare
    shutil.rmtree(fake_runs.make(tmp_path / "silent") / "completions")
    silent = page.render(runs.load([str(tmp_path / "silent")]))
    assert '<figure id="accuracy">' in silent and 'id="samples-data"' not in silent
    begun = fake_runs.make(tmp_path / "begun", answers={}) / "metrics.jsonl"
    begun.write_text('{"step": ')
    assert "step 0</small>" in page.render(runs.load([str(tmp_path / "begun")]))


def test_the_same_runs_give_the_same_bytes(index, tmp_path):
    shutil.copytree(index.parents[1] / "runs", tmp_path / "runs")
    page.write([str(tmp_path / "runs")], str(tmp_path / "out"), f"report {EVIL}")
    assert (tmp_path / "out/index.html").read_bytes() == index.read_bytes()


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
        (("absent", "--watch"), "absent holds no run"),
        (("good", "--watch", "--port=1"), "--port=1: "),
    ]:
        if "--port=1" in args and os.geteuid() == 0:
            continue  # who may open any port
        done = _run(*args, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and message in done.stderr
