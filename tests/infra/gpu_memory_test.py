"""What a run reserves of a GPU, and that the plan counts on the same."""

import os
import sys

import pytest

from pfjax import cli
from pfjax.infra import gpu_memory, hardware

OLD, NEW = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    for name in (OLD, NEW):
        monkeypatch.delenv(name, raising=False)


def _said_by_a_command(monkeypatch):
    """The variables as the main function of a command finds them."""
    found = {}

    def main():
        found.update({x: os.environ[x] for x in (OLD, NEW) if x in os.environ})

    monkeypatch.setattr(sys, "argv", ["command"])
    cli.run(main)
    return found


def test_commands_reserve_more_than_jax_does(monkeypatch):
    monkeypatch.setenv(NEW, "")  # for it to be taken back
    assert _said_by_a_command(monkeypatch) == {NEW: "0.92"}
    chip = hardware.CHIPS["h100"]
    assert hardware.usable_memory(chip) == pytest.approx(0.92 * chip.memory)


@pytest.mark.parametrize("name", [OLD, NEW])
def test_what_the_user_says_stands(monkeypatch, name):
    monkeypatch.setenv(name, "0.5")
    # JAX refuses both at once.
    assert _said_by_a_command(monkeypatch) == {name: "0.5"}
    assert gpu_memory.fraction() == 0.5
    chip = hardware.CHIPS["h100"]
    assert hardware.usable_memory(chip) == pytest.approx(0.5 * chip.memory)


def test_of_a_tpu_all_is_used():
    assert hardware.usable_memory(hardware.CHIPS["v5e"]) == 15.75 * hardware.GIB
