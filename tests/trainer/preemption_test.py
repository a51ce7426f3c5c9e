"""Being told to stop, wherever the program is then."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pfjax.trainer import preemption
from tests.conftest import ROOT


def test_a_ctrl_c_within_the_garbage_collector_is_not_lost(monkeypatch):
    """JAX has a callback there, and Python drops what is raised in one."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    preemption.hear_again()
    # Tests that a script has sent to the background ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begun = []

    def interrupted(phase, info):
        if not begun:
            begun.append(phase)
            raise KeyboardInterrupt

    gc.callbacks.append(interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            gc.collect()
            time.sleep(5)
    finally:
        gc.callbacks.remove(interrupted)
        signal.signal(signal.SIGINT, before)


def test_after_the_last_save_each_signal_stops_at_once():
    """Also one that comes again, since what the first raised was dropped."""
    with preemption.Preemption() as stop:
        stop.stop_at_once("saved")
        for _ in range(2):
            with pytest.raises(preemption.Preempted, match="SIGTERM: saved"):
                os.kill(os.getpid(), signal.SIGTERM)


_IN_A_TERMINAL = """
import os, signal, sys, time
from pfjax.trainer import preemption

signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))  # whatever these tests have

with preemption.Preemption() as stop:
    print("begun", flush=True)
    while not stop.is_asked:
        time.sleep(0.01)
    time.sleep(0.5)  # to save; meanwhile it is told again
    print("saved", flush=True)
    print("saved", file=sys.stderr, flush=True)
sys.exit(preemption.EXIT_STATUS)
"""


@pytest.mark.parametrize(("ignored", "status"), [(False, 75), (True, -9)])
def test_a_terminal_that_closes_stops_a_run_after_a_save(ignored, status):
    """Unless it runs under nohup."""
    ours, its = os.openpty()
    run = [sys.executable, "-c", _IN_A_TERMINAL, "SIG_IGN" if ignored else "SIG_DFL"]
    process = subprocess.Popen(run, cwd=ROOT, stdin=its, stdout=its, stderr=its)
    os.close(its)
    said = b""
    while (
        b"begun\r\n" not in said
    ):  # all of it: else the rest is written to a closed end
        said += os.read(ours, 1000)
    os.close(ours)
    for _ in range(3):  # by the shell, and by the system
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    if ignored:
        time.sleep(1)
        process.kill()
    assert process.wait(60) == status


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_output_that_nobody_reads_stops_a_run_after_a_save(ignored, both):
    """`| head`, with the errors or without them; nohup goes on."""
    code = _IN_A_TERMINAL.replace(
        'print("begun", flush=True)', "preemption.say('begun')"
    )
    reads, writes = os.pipe()
    os.close(reads)
    run = [sys.executable, "-c", code, "SIG_IGN" if ignored else "SIG_DFL"]
    errors = writes if both else subprocess.PIPE
    process = subprocess.Popen(run, cwd=ROOT, stdout=writes, stderr=errors)
    os.close(writes)
    if ignored:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-9 if ignored else preemption.EXIT_STATUS)
    if not both and not ignored:
        assert said.decode().startswith("SIGHUP: saving after this step")


def test_a_run_in_a_thread_of_ones_own_leaves_signals_alone():
    before, found = signal.getsignal(signal.SIGINT), []

    def enter():
        with preemption.Preemption() as stop:
            found.append((stop.is_asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(False, before)]
