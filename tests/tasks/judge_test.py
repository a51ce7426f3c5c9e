"""A judge behind an endpoint: what it is asked, and what may go wrong."""

import contextlib
import http.server
import json
import math
import threading
import time

import numpy as np
import pytest

from pfjax.tasks import grading, judge, rewards
from pfjax.tasks.problems import Problem

_FILE = """
url = "http://127.0.0.1:{port}/v1"
model = "a-judge"
scale = [0, 10]
prompt = '''Q: {{prompt}} A: {{completion}} Right: {{answer}} {{x}}'''
options = {{ temperature = 0 }}
"""


class _Endpoint(http.server.ThreadingHTTPServer):
    """Answers by what the completion says; `asked` holds headers and bodies."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked, self.times = [], {}
        self.under_way = self.most = 0
        self.lock = threading.Lock()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        server, size = self.server, int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(size))
        said = body["messages"][0]["content"]
        said = said.partition(" A: ")[2].partition(" Right: ")[0]
        with server.lock:
            server.asked.append((self.path, dict(self.headers), body))
            server.times[said] = server.times.get(said, 0) + 1
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        time.sleep(0.05)
        with contextlib.suppress(OSError):
            self._answer(said)
        with server.lock:
            server.under_way -= 1

    def _answer(self, said):
        is_first = self.server.times[said] == 1
        if said == "busy" and is_first:
            return self._send(429, b"slow down", {"Retry-After": "0.2"})
        if said == "cut off" and is_first:
            return self.connection.close()
        if said == "forbidden":
            return self._send(403, b'{"error": "no\n such key"}')
        if said == "hang":
            time.sleep(3)
        if said == "no JSON":
            return self._send(200, b"<html>")
        reason = "length" if said == "7 and on" else "stop"
        content = {"refuse": None, "sorry": "I cannot judge that.", "much": "11"}
        content |= {"7 and on": "7", "fraction": "7/10", "reasons": "Right.\n\n 6.5 \n"}
        message = {"role": "assistant", "content": content.get(said, "4")}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        self._send(200, json.dumps({"choices": [choice]}).encode())

    def _send(self, status, content, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with _Endpoint() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def file(endpoint, tmp_path):
    path = tmp_path / "judge.toml"
    path.write_text(_FILE.format(port=endpoint.server_port))
    return path


def _scores(file, completions, seconds=10.0, gold="2"):
    group = {"prompts": ["1+1"] * len(completions), "completions": completions}
    with judge.Judge(f"judge:{file}", str(file), seconds) as function:
        (got,) = function([group | {"answer": [gold] * len(completions)}])
    return got, function.failures


def test_a_judge_is_asked_what_the_file_says(endpoint, file, monkeypatch):
    monkeypatch.setenv("PFJAX_JUDGE_KEY", "secret")
    assert _scores(file, ["{answer}"]) == ([4.0], 0)
    ((path, headers, body),) = endpoint.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    asked = "Q: 1+1 A: {answer} Right: 2 {x}"
    assert body["messages"] == [{"role": "user", "content": asked}]
    assert (body["model"], body["temperature"]) == ("a-judge", 0)
    monkeypatch.setenv("PFJAX_JUDGE_KEY", "secret\n")  # as files end
    _scores(file, ["a"])
    assert endpoint.asked[1][1]["Authorization"] == "Bearer secret"
    for key in ("sécret", "a\nb"):
        monkeypatch.setenv("PFJAX_JUDGE_KEY", key)
        with pytest.raises(ValueError, match="KEY has characters that no key") as error:
            _scores(file, ["a"])
        assert key not in str(error.value)


def test_a_reply_without_a_score_costs_that_response_its_reward(endpoint, file):
    bad = ["refuse", "sorry", "much", "fraction", "7 and on", "no JSON", "forbidden"]
    got, failures = _scores(file, [*bad, "good", "reasons"])
    assert [math.isnan(x) for x in got] == [True] * len(bad) + [False] * 2
    assert got[-2:] == [4, 6.5] and failures == len(bad)
    assert all(endpoint.times[x] == 1 for x in bad)  # asking again is of no use


def test_what_passes_is_asked_again_and_what_hangs_is_given_up(endpoint, file):
    start = time.monotonic()
    got, failures = _scores(file, ["busy", "cut off", "hang"] + ["a"] * 5, seconds=2.0)
    assert time.monotonic() - start < 2.9
    assert got[:2] == [4, 4] and math.isnan(got[2]) and failures == 1
    assert endpoint.times["busy"] == endpoint.times["cut off"] == 2
    assert endpoint.most > 3  # side by side


def test_a_judge_that_scores_nothing_ends_the_run_with_one_line(file):
    for said, message in [
        ("forbidden", 'answers 403 Forbidden: {"error": "no such key"}'),
        ("fraction", "'7/10' does not end with a line that is a number from 0 to 10"),
        ("refuse", "a reply without text"),
    ]:
        with pytest.raises(ValueError, match="failed for every response") as error:
            _scores(file, [said])
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="which the prompt '1.1' has none of"):
        _scores(file, ["a"], gold=None)
    file.write_text(_FILE.format(port=1))
    with pytest.raises(ValueError, match="ConnectError .*; given up after 0.5 s"):
        _scores(file, ["a"], seconds=0.5)


def test_a_judge_is_a_term_of_a_reward(file):
    text = f"0.1 * judge:{file}"
    rewards.check(text)
    with rewards.Reward(text) as reward, grading.Grader() as grader:
        reward.start()
        problem = Problem("0", [{"role": "user", "content": "1+1"}], "2")
        ids = [np.zeros(1)] * 2
        got = reward.values([problem], ["good", "sorry"], ids, grader)
        assert reward.files() == [file] and reward.failures == 1
    assert got.tolist() == pytest.approx([0.4, 0.0])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("http:", "ftp:", "url must be http://HOST/v1, or https, got 'ftp:"),
        ("127.0.0.1", "", "url must be http://HOST/v1, or https, got 'http://:"),
        ("127.0.0.1", "[::1", "Invalid IPv6 URL"),
        ("127.0.0.1", "127.0.0.1:PORT", "Port could not be cast to integer"),
        ("127.0.0.1", "127.0.0.1:99999/", "Port out of range"),
        ("= 0 }", "= 2026-01-01 }", "date is not JSON serializable"),
        ("= 0 }", "= nan }", "not JSON compliant"),
        ("completion", "response", r"the prompt must contain {completion}"),
        ("[0, 10]", "[10, 0]", r"least and the greatest .*, got \[10, 0\]"),
        ("model", "name", "look at model, name"),
        ("[0, 10]", "10", "least and the greatest .*, got 10"),
        ("scale = ", "scale ", "line 4"),
    ],
)
def test_a_mistake_in_the_file_is_said_before_anything_starts(file, old, new, message):
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        rewards.check(f"accuracy, judge:{file}")
    with pytest.raises(ValueError, match="No such file"):
        rewards.check("judge:nowhere.toml")
