"""HTML: what others wrote cannot become part of it."""

import html.parser
import re

from pfjax.report import page, runs
from pfjax.report.outcomes import Moved, Value

EVIL = "<script>alert(1)</script>\"'&"
MEMBER = page.Member("powerflow", "s0", "seeds 0, 1", 0, 200)


def _problem(*texts, correct=None, prompt="1+1"):
    verdicts = correct or [None] * len(texts)
    return runs.Problem(
        (0, prompt),
        [
            {
                "sample": i,
                "completion": text,
                "tokens": 7,
                "terminated": i == 0,
                "answer": None if right is None else "2",
                "gold": None if right is None else EVIL,
                "correct": right,
            }
            for i, (text, right) in enumerate(zip(texts, verdicts, strict=True))
        ],
    )


class _Tags(html.parser.HTMLParser):
    """Counts tags, and sees that they close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.seen, self._open = [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


def test_nothing_that_others_wrote_is_markup():
    evil = page.Member(EVIL, "s0", EVIL, 0, 1)
    graded = _problem(EVIL, correct=[True], prompt=EVIL)
    content = (
        page.note(EVIL)
        + page.numbers([evil], [page.Column(EVIL, EVIL, [None])])
        + page.pictures(
            [page.Picture("a", EVIL, EVIL, "<svg></svg>", "<svg></svg>")], True
        )
        + page.samples(evil, [(graded, graded)], True)
        + page.samples(evil, [(_problem(EVIL * 99), _problem(EVIL))], False)
        + page.moved([evil], [None])
        + page.settings([evil], {EVIL: EVIL}, {EVIL: [EVIL]})
    )
    text = page.document(EVIL, EVIL, EVIL, [EVIL], [("a", EVIL, content)])
    tags = _Tags(text)
    assert "script" not in tags.seen and "<script" not in text
    assert "alert(1)&lt;/script&gt;&quot;&#x27;&amp;" in text


def test_nothing_is_fetched_and_phones_are_told_the_width():
    text = page.document("t", "l", "c", [], [("a", "h", "")])
    assert not re.findall(r"https?:|src=|@import|url\(", text)
    assert 'name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text


def test_values():
    assert page.show_value(Value(0.98999, None), 3) == "0.990"
    assert page.show_value(Value(-0.0001, None), 3) == "0.000"
    text = page.show_value(Value(-1.5, 0.26), 1)
    assert text == '−1.5<span class="spread"> ±.3</span>'
    assert page.show_value(Value(951.04, None), 1) == "951"
    assert page.show_value(Value(1234.56, None), 3) == "1234.6"


def test_a_table_of_numbers_has_a_row_a_group_with_first_and_last():
    column = page.Column("avg@8", "share", [(Value(0.5, 0.1), Value(0.75, None))])
    text = page.numbers([MEMBER], [column])
    assert 'data-label="avg@8"' in text and "seeds 0, 1 · step 0" in text
    assert re.search(r'class="first">0\.500<span class="spread"> ±\.100', text)
    assert re.search(r'class="last"><span class="arrow">→</span> 0\.750<', text)


def test_samples_say_right_and_wrong_in_words():
    before = _problem("two", "three", "four", correct=[True, False, False])
    after = _problem("two", "two", "two", correct=[True, True, True])
    text = page.samples(MEMBER, [(before, after)], is_open=True)
    assert "right in 1 of 3 samples" in text and "3 of 3" in text
    # Of most samples the verdict, and the first with it.
    assert "✗ wrong</span> · sample 1, 7 tokens, cut</p><pre>\nthree</pre>" in text
    assert "✓ right</span> · sample 0, 7 tokens</p><pre>\ntwo</pre>" in text
    assert "before (step 0)" in text and "after (step 200)" in text


def test_long_texts_are_folded_and_whole():
    long = "word " * 500 + "end"
    text = page.samples(MEMBER, [(_problem(long), _problem(" "))], is_open=False)
    assert f"<pre>\n{long}</pre></details>" in text and "(empty)" in text
    assert text.count("<details") == 2 and " open" not in text
    assert "right" not in text and "wrong" not in text  # nobody knows


def test_which_problems_moved_and_settings():
    text = page.moved([MEMBER, MEMBER], [Moved(5.5, 0, 58.5, 0, 63, 0.5, 0.5), None])
    assert '<td data-label="wrong → right">5.5</td>' in text and text.count(">—<") == 7
    three = [MEMBER] * 3
    text = page.settings(three, {"seed": "1"}, {"alpha": ["4", "4", "2"]})
    assert text.count('class="usual">4<') == 2 and 'class="own">2<' in text
    assert "Settings that all groups share (1)" in text
