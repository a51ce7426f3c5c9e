"""pfjax report --watch: the page over HTTP, made anew when a run goes on."""

import contextlib
import http.client
import json
import threading

import pytest

from pfjax.infra import dataset_io
from pfjax.report import serve
from tests.report import fake_runs


@contextlib.contextmanager
def serving(*paths):
    """Yields the port of a server of runs."""
    with serve.make_server([str(p) for p in paths], 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _get(port, path, host=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_and_its_version_follow_the_run(tmp_path):
    folder = fake_runs.make(tmp_path / "a")
    with serving(folder) as port:
        status, text = _get(port, "/")
        version = _get(port, "/version")[1]
        assert status == 200 and f'"version": "{version}"' in text
        assert "step 4</small>" in text and _get(port, "/version")[1] == version
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 5, "entropy": 0.5}) + '\n{"step": 6, "ent')
        assert _get(port, "/version")[1] != version
        assert "step 5</small>" in _get(port, "/")[1]


def test_a_version_is_told_without_reading_the_runs(tmp_path, monkeypatch):
    with serving(fake_runs.make(tmp_path / "a")) as port:
        monkeypatch.delattr(dataset_io, "read_jsonl")
        assert _get(port, "/version")[0] == 200


def test_nothing_else_is_served_and_to_no_one_else(tmp_path):
    with serving(fake_runs.make(tmp_path / "a")) as port:
        assert _get(port, "/a/config.json")[0] == 404
        assert _get(port, "/", "attacker.example")[0] == 403
        assert _get(port, "/", f"localhost:{port}")[0] == 200


def test_a_run_that_is_not_there_is_told_before_serving(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        serve.make_server([str(tmp_path)], 0)
