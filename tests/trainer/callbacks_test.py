"""Functions of a person that a run calls."""

import sys

import pytest

from pfjax.trainer.callbacks import Callbacks


def test_a_callback_that_ends_the_program_does_so_after_the_save():
    callbacks = Callbacks(lambda step, values: sys.exit(3), None)
    callbacks.on_step(1, {})
    assert callbacks.has_failed  # the run saves now
    with pytest.raises(SystemExit):
        callbacks.raise_error(1)
