"""Being told to stop, wherever the program is then."""

import gc
import os
import signal
import sys
import threading
import time

import pytest

from pfjax.trainer import preemption


def test_a_ctrl_c_within_the_garbage_collector_is_not_lost(monkeypatch):
    """JAX has a callback there, and Python drops what is raised in one."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    preemption.hear_again()
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


def test_after_the_last_save_each_signal_stops_at_once():
    """Also one that comes again, since what the first raised was dropped."""
    with preemption.Preemption() as stop:
        stop.stop_at_once("saved")
        for _ in range(2):
            with pytest.raises(preemption.Preempted, match="SIGTERM: saved"):
                os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_in_a_thread_of_ones_own_leaves_signals_alone():
    before, found = signal.getsignal(signal.SIGINT), []

    def enter():
        with preemption.Preemption() as stop:
            found.append((stop.is_asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(False, before)]
