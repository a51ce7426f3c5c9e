"""Checkpoints: which are kept, on which mesh they come back, what a checksum notices.

Kills, damage and full disks are in tests/faults_test.py.
"""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from pfjax.infra import sharding
from pfjax.trainer import checkpoint
from tests.conftest import has_proc

IDENTITY = {"alpha": 4.0, "base": "0123"}


def _about(step):
    return {"step": step, "prompts": 8 * step, "identity": IDENTITY}


def _state(mesh, scale=1.0):
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return {
        "w": jax.device_put(scale * jnp.arange(32.0).reshape(8, 4), split),
        "half": jax.device_put(jnp.arange(8, dtype=jnp.bfloat16), split),
        "step": jax.device_put(jnp.int32(3), sharding.replicated(mesh)),
    }


def _replay(step):
    """As many as there are steps."""
    return {"tokens": np.arange(4 * step, dtype=np.int32), "lengths": np.full(step, 4)}


def _abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def test_the_latest_and_the_best_are_kept(tmp_path):
    metric = {1: 0.5, 2: 0.9, 3: 0.1, 4: None, 5: 0.2, 6: None}
    state = _state(sharding.make_mesh(1, -1, 1))
    with checkpoint.Checkpoints(epath.Path(tmp_path), keep_best=1) as checkpoints:
        for step, value in metric.items():
            checkpoints.save(step, state, _about(step), value)
        checkpoints.wait()
    with checkpoint.Checkpoints(epath.Path(tmp_path), keep_best=1) as checkpoints:
        assert checkpoints.steps == [2, 5, 6]
        checkpoints.save(7, state, _about(7), 0.95)
        checkpoints.save(8, state, _about(8), 0.3)
        checkpoints.save(9, state, _about(9))
        checkpoints.wait()
        assert checkpoints.steps == [7, 8, 9]


@has_proc
def test_saves_leave_no_files_open(tmp_path):
    """A long run would reach the limit."""
    state, seen = _state(sharding.make_mesh(1, -1, 1)), []
    with checkpoint.Checkpoints(epath.Path(tmp_path), keep_best=1) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(step, state, _about(step))
            checkpoints.wait()
            seen.append(len(os.listdir("/proc/self/fd")))
    assert len(set(seen)) == 1


def test_a_state_comes_back_on_another_mesh(tmp_path):
    state = _state(sharding.make_mesh(1, 8, 1))
    with checkpoint.Checkpoints(epath.Path(tmp_path), keep_best=1) as checkpoints:
        assert checkpoints.restore(_abstract(state), IDENTITY) is None
        checkpoints.save(3, state, _about(3))
        checkpoints.wait()
        other = _state(sharding.make_mesh(2, 1, 4), scale=0.0)
        found, about = checkpoints.restore(_abstract(other), IDENTITY)
    assert about["prompts"] == 24
    assert found["w"].sharding == other["w"].sharding != state["w"].sharding
    for name in state:
        np.testing.assert_array_equal(found[name], state[name])


def test_another_run_is_refused_with_what_differs(tmp_path):
    state = _state(sharding.make_mesh(1, -1, 1))
    with checkpoint.Checkpoints(epath.Path(tmp_path), keep_best=1) as checkpoints:
        checkpoints.save(3, state, _about(3))
        checkpoints.wait()
        with pytest.raises(checkpoint.OtherRun, match=r"alpha: 4.0 -> 2.0"):
            checkpoints.restore(_abstract(state), {**IDENTITY, "alpha": 2.0})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint8"])
def test_a_checksum_notices_one_changed_value_and_an_exchange(rng, dtype):
    x = rng.normal(size=(5, 7, 3)) * 100
    x = np.asarray(jnp.asarray(x > 0 if dtype == "bool" else x).astype(dtype))
    want = int(checkpoint.checksum(jnp.asarray(x)))
    for at in ((0, 0, 0), (4, 6, 2), (2, 3, 1)):
        y = x.copy()
        bits = y.view(f"u{y.dtype.itemsize}")
        bits[at] ^= 1
        assert int(checkpoint.checksum(jnp.asarray(y))) != want
    swapped = x[::-1].copy()
    assert int(checkpoint.checksum(jnp.asarray(swapped))) != want


def test_a_checksum_does_not_depend_on_the_mesh(rng):
    x = rng.normal(size=(16, 8)).astype(np.float32)
    sums = set()
    for sizes in ((1, 8, 1), (2, 2, 2), (8, 1, 1)):
        mesh = sharding.make_mesh(*sizes)
        for spec in (PartitionSpec("fsdp", "tensor"), PartitionSpec(None, ("data",))):
            y = jax.device_put(x, NamedSharding(mesh, spec))
            sums.add(int(jax.jit(checkpoint.checksum)(y)))
    assert len(sums) == 1
    # By hand: bits of 1.0 and 2.0, weights 1 and 3.
    bits = (0x3F800000 + 3 * 0x40000000) % 2**32
    assert int(checkpoint.checksum(jnp.array([1.0, 2.0]))) == bits


DAMAGE = {
    "truncated": lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
    "emptied": lambda f: f.write_bytes(b""),
    "changed": lambda f: f.write_bytes(_flipped(f.read_bytes())),
    "removed": lambda f: f.unlink(),
}


def _flipped(data):
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_file_is_damaged_the_state_is_one_that_was_saved(tmp_path, damage):
    mesh = sharding.make_mesh(1, 8, 1)
    with checkpoint.Checkpoints(epath.Path(tmp_path / "a"), keep_best=1) as checkpoints:
        for step in (3, 4):
            args = (step, _state(mesh, step), _about(step), 0.1 * step)
            checkpoints.save(*args, _replay(step))
        checkpoints.wait()
    names = [
        x.relative_to(tmp_path / "a")
        for x in (tmp_path / "a/4").rglob("*")
        if x.is_file() and (x.stat().st_size or damage == "removed")
    ]
    assert len(names) > 8
    passed_over = 0
    for i, name in enumerate(names):
        folder = tmp_path / f"run{i}"
        shutil.copytree(tmp_path / "a", folder)
        DAMAGE[damage](folder / name)
        with checkpoint.Checkpoints(epath.Path(folder), keep_best=1) as checkpoints:
            found, about = checkpoints.restore(_abstract(_state(mesh)), IDENTITY)
            step = about["step"]
            # Some files say nothing that is needed; nothing in between is accepted.
            assert step in (3, 4), name
            for key, value in _state(mesh, step).items():
                np.testing.assert_array_equal(found[key], value, err_msg=str(name))
            for key, value in _replay(step).items():
                got = about["replay"][key]
                np.testing.assert_array_equal(got, value, err_msg=str(name))
            passed_over += step == 3
            # And the run goes on.
            checkpoints.save(4, _state(mesh, 4), _about(4), 0.4)
            checkpoints.save(5, _state(mesh, 5), _about(5), 0.5)
            checkpoints.wait()
        with checkpoint.Checkpoints(epath.Path(folder), keep_best=1) as checkpoints:
            _, about = checkpoints.restore(_abstract(_state(mesh)), IDENTITY)
            assert about["step"] == 5 and checkpoints.steps == [4, 5], name
    assert passed_over >= 4


def test_responses_of_another_checkpoint_are_not_taken_for_its_own(tmp_path, capsys):
    state = _state(sharding.make_mesh(1, -1, 1))
    with checkpoint.Checkpoints(epath.Path(tmp_path), keep_best=1) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, state, _about(step), 0.1, _replay(step))
        checkpoints.wait()
    shutil.rmtree(tmp_path / "4/replay")
    shutil.copytree(tmp_path / "3/replay", tmp_path / "4/replay")
    with checkpoint.Checkpoints(epath.Path(tmp_path), keep_best=1) as checkpoints:
        _, about = checkpoints.restore(_abstract(state), IDENTITY)
    assert about["step"] == 3
    said = "checkpoint 4 is damaged and passed over: replay is not what was saved"
    assert said in capsys.readouterr().out


def _kept(folder, ratings, best_of=""):
    """Saves a checkpoint per step, each rated afterwards; the steps that are kept."""
    state = _state(sharding.make_mesh(1, -1, 1))
    with checkpoint.Checkpoints(epath.Path(folder), 1, best_of) as checkpoints:
        for step, value in ratings.items():
            checkpoints.save(step, state, _about(step))
            checkpoints.rate(step, value)
        checkpoints.wait()
        found = checkpoints.restore(_abstract(state), IDENTITY)
        assert found[1]["step"] == max(ratings)
        return checkpoints.steps


def test_a_metric_may_come_after_the_checkpoint(tmp_path):
    folder = epath.Path(tmp_path)
    assert _kept(folder, {1: 0.5, 2: 0.9, 3: 0.1, 4: None, 5: 0.2}) == [2, 4, 5]
    assert checkpoint.best_step(folder) == 2
    assert _kept(folder, {6: 0.3, 7: None, 8: 0.4}) == [2, 7, 8]


def test_a_metric_of_another_evaluation_is_dropped(tmp_path, capsys):
    folder = epath.Path(tmp_path)
    assert _kept(folder, {1: 0.9, 2: 0.1, 3: 0.2}, "eval/avg of 7") == [1, 2, 3]
    assert _kept(folder, {4: 0.3}, "eval/avg of 7") == [1, 3, 4]
    assert _kept(folder, {5: 0.2, 6: 0.1, 7: 0.1}, "eval/avg of 8") == [5, 6, 7]
    assert checkpoint.best_step(folder) == 5
    assert "is of eval/avg of 7, not of eval/avg of 8" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run[1]", "a*", "a?"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    """It writes checkpoints there, and does not find what is in them."""
    with pytest.raises(ValueError, match="in its path, which Orbax"):
        checkpoint.check_place(epath.Path(tmp_path / name))
    with pytest.raises(ValueError, match="in its path, which Orbax"):
        checkpoint.read_policy(epath.Path(tmp_path / name), 1, {})
    checkpoint.check_place(epath.Path(tmp_path / "a b%d{x}=1"))
