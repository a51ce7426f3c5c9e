"""Processes that work for others, where systems differ."""

import resource

from pfjax.tasks import processes


def test_macos_has_no_limit_of_addresses(monkeypatch):
    def refuse(which, limits):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    processes.limit_memory(2**30)
