"""How processes find each other: what JAX is asked for. The rest is in faults_test.py."""

import jax
import pytest

from pfjax.infra import distributed


@pytest.fixture
def asked(monkeypatch):
    """What `jax.distributed.initialize` was called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: calls.append(kw))
    return calls


def test_a_dead_process_is_noticed_within_a_minute(asked):
    distributed.join()
    (kwargs,) = asked
    assert kwargs["heartbeat_timeout_seconds"] <= 60


def test_the_environment_says_where_and_how_long(asked, monkeypatch, capsys):
    for name, value in zip(distributed.VARIABLES, ("host:1", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PFJAX_JOIN_SECONDS", "5")
    distributed.join()
    (kwargs,) = asked
    assert kwargs["initialization_timeout"] == 5
    assert kwargs["coordinator_address"] == "host:1"
    assert (kwargs["num_processes"], kwargs["process_id"]) == (2, 1)
    said = capsys.readouterr().err
    assert "joining the other processes at host:1, for at most 5 s" in said
