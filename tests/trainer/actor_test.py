"""Stale responses: as old as allowed, the same each time, and the optimum stays where it is."""

import dataclasses
import re
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfjax.infra import dataset_io, sharding
from pfjax.model import lora, transformer
from pfjax.sampler import stream, unstack
from pfjax.tasks import rewards
from pfjax.trainer import actor, iteration, loop, preemption
from pfjax.trainer.actor import Cursor
from tests.conftest import length_aware_target, total_variation
from tests.trainer.loop_test import _distribution, small_config


def test_a_cursor_knows_what_has_been_trained_on():
    cursor = Cursor().after([0, 2]).after([3, 5])
    assert cursor == (6, (1, 4))
    assert cursor.after([4, 1]) == (6, ())
    assert Cursor().after([0, 1]).after([2, 3]) == (4, ())


class _Stream:
    """Stands for a stream of 6 slots, some of whose responses take very long."""

    def __init__(self, rng):
        self.rng, self.num_added, self.taken = rng, 0, []
        self.waiting, self.left, self.born = [], {}, {}

    @property
    def held(self):
        return [*self.left, *self.waiting]

    def set_weights(self, weights, step):
        self.step = step

    def add(self, prompts, ids, is_last):
        self.waiting += range(self.num_added, self.num_added + len(prompts))
        self.num_added += len(prompts)

    def complete(self):
        return [q for q, ticks in self.left.items() if ticks <= 0]

    def oldest(self, q):
        return self.born.get(q, self.step)

    def draw_until(self, is_enough):
        for _ in range(1000):
            if is_enough():
                return
            busy = [q for q, ticks in self.left.items() if ticks > 0]
            new, self.waiting = (
                self.waiting[: 6 - len(busy)],
                self.waiting[6 - len(busy) :],
            )
            for q in new:
                self.left[q] = self.rng.choice([1, 2, 40])
                self.born[q] = self.step
            for q in busy + new:
                self.left[q] -= 1
        raise AssertionError("nothing is enough")

    def take(self, prompts):
        assert all(self.left.pop(q) <= 0 for q in prompts)
        return [self.born[q] for q in prompts]


@pytest.mark.parametrize(
    ("staleness", "ahead"), [(1, 0), (2, 0), (4, 0), (1, 1), (2, 1), (4, 1), (4, 3)]
)
@pytest.mark.parametrize("seed", range(4))
def test_whatever_takes_long_nothing_gets_too_old(staleness, ahead, seed):
    cursor, ids, oldest = _drawn(seed, Cursor(), 1, staleness=staleness, ahead=ahead)
    assert cursor == (80, ())
    assert sorted(ids) == list(range(80))
    # Those that take long are kept as long as may be.
    assert max(oldest) == staleness


def test_what_is_in_flight_at_a_preemption_is_begun_again():
    cursor, ids, _ = _drawn(0, Cursor(), 1, last=7, staleness=4, ahead=1)
    assert cursor.skipped
    cursor, more, _ = _drawn(1, cursor, 8, staleness=4, ahead=1)
    assert sorted(ids + more) == list(range(80))


def _drawn(seed, cursor, first, last=20, *, staleness, ahead):
    """The cursor, the prompts, and the age of the oldest, after some of 20 steps."""
    streams = [_Stream(np.random.default_rng(seed))]
    made = actor.Actor(
        sharding.make_mesh(devices=jax.devices()[:1]),
        lambda: streams,
        lambda params: params,
        dict,
        lambda drawn, indices, ids, step: drawn[0],
        lambda ids: [0 for _ in ids],
        [[1]],
        prompts_per_step=4,
        num_steps=20,
        checkpoint_every=100,
        max_staleness=staleness,
        ahead=ahead,
    )
    seen, oldest = [], []
    with made:
        for step in range(first, last + 1):
            ids, _, born, *_ = made.draw({}, cursor, step)
            cursor = cursor.after(ids)
            seen += ids
            oldest.append(step - 1 - min(born))
    return cursor, seen, oldest


@pytest.fixture
def config(enumerable_folder, tmp_path):
    c = small_config(enumerable_folder, tmp_path)
    c.mesh.data = 2
    c.rollout_slots = 16  # an eighth of the samples of a step
    c.num_steps = 6
    c.max_staleness = 2
    return c


def _run(config, folder):
    number = config.mesh.data + config.mesh.rollout
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:number]
        patch.setattr(jax, "devices", lambda *_: devices)
        loop.train_and_evaluate(config, str(folder))
    rows = dataset_io.read_jsonl(folder / "metrics.jsonl")
    return rows, [
        dataset_io.read_jsonl(file) for file in sorted(folder.glob("schedule/*"))
    ]


@pytest.mark.parametrize(
    ("apart", "base"),
    [
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in ((0, 0.5), (1, 0.0), (1, 0.5))
        ),
        (0, 0.0),
    ],
)
def test_no_token_is_older_than_allowed_and_each_prompt_is_trained_on_once(
    config, tmp_path, apart, base
):
    config.mesh.rollout, config.checkpoint_every = apart, 6
    config.behavior.base = base
    rows, schedule = _run(config, tmp_path / "run")
    ages = [x["rollout/staleness_max"] for x in rows if x["step"]]
    assert 1 <= max(ages) <= 2
    assert min(ages[1:]) >= apart
    prompts = [row["prompt"] for of_step in schedule for row in of_step]
    assert sorted(prompts) == list(range(config.prompts_per_step * config.num_steps))
    responses = [[y for row in of for y in row["weights"]] for of in schedule]
    assert {len(x) for x in responses} == {8 * 16 * (1 - base)}
    oldest = [max(n - y[0][1] for y in of) for n, of in enumerate(responses)]
    assert oldest == ages
    tb = [x["tb/exponent_base"] for x in rows if x["step"] and base]
    assert np.isfinite(tb).all()


def _same(one, two):
    a, b = ((x / "hf/model.safetensors").read_bytes() for x in (one, two))
    return a == b


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(config, tmp_path):
    """Killed where rounds of later steps were at work, after step 3 of a checkpoint at 2."""
    config.mesh.rollout = 1
    _run(config, tmp_path / "whole")
    do = iteration.train_iteration

    def killed(trainer, state, cursor, step, grader):
        if step == 4:
            raise KeyboardInterrupt
        return do(trainer, state, cursor, step, grader)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(iteration, "train_iteration", killed)
        _run(config, tmp_path / "run")
    assert len(dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")) == 4
    _run(config, tmp_path / "run")
    assert _same(tmp_path / "run", tmp_path / "whole")
    for file in (tmp_path / "whole/schedule").iterdir():
        assert file.read_text() == (tmp_path / "run/schedule" / file.name).read_text()


@pytest.mark.slow
def test_what_was_in_flight_at_a_preemption_is_begun_again(config, tmp_path):
    """Saved after step 1, between two checkpoints, with prompts of step 2 begun."""
    do = iteration.train_iteration

    def preempted(trainer, state, cursor, step, grader):
        signal.raise_signal(signal.SIGTERM)
        return do(trainer, state, cursor, step, grader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration, "train_iteration", preempted)
        with pytest.raises(preemption.Preempted):
            _run(config, tmp_path / "run")
    _, schedule = _run(config, tmp_path / "run")
    prompts = [row["prompt"] for of_step in schedule for row in of_step]
    assert sorted(prompts) == list(range(config.prompts_per_step * config.num_steps))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [(0.6, 0.3), (0.3, 0.6)])
def test_a_step_takes_no_longer_than_the_longer_of_drawing_and_learning(
    config, tmp_path, monkeypatch, seconds
):
    """Both are slowed down, by a second in all."""
    config.mesh.rollout, config.num_steps, config.max_staleness = 1, 12, 1
    config.mesh.data, config.checkpoint_every = 1, 100
    draw, compute = stream.Stream.draw_until, rewards.compute_rewards

    def slowly(do, seconds):
        def run(*args, **kwargs):
            time.sleep(seconds)
            return do(*args, **kwargs)

        return run

    monkeypatch.setattr(stream.Stream, "draw_until", slowly(draw, seconds[0]))
    monkeypatch.setattr(rewards, "compute_rewards", slowly(compute, seconds[1]))
    rows, _ = _run(config, tmp_path / "run")
    drawing, whole, waited = (
        np.array([x[f"time/{name}"] for x in rows[-8:]])
        for name in ("actor", "step", "rollout")
    )
    longer = max(np.median(drawing), np.median(whole - waited))
    assert np.median(whole) <= 1.1 * longer


def test_weights_arrive_whole_and_of_adapters_no_others_are_sent(tiny_policy):
    config = dataclasses.replace(tiny_policy.config, lora_rank=2, lora_alpha=4.0)
    devices = jax.devices()
    learner = sharding.make_mesh(fsdp=2, tensor=2, devices=devices, rollout=4)
    own = sharding.rollout_mesh(4, 2, devices)
    assert not {*learner.devices.flat} & {*own.devices.flat}
    place = lambda config, params: jax.device_put(
        params,
        sharding.tree_shardings(
            learner,
            transformer.logical_axes(config),
            transformer.abstract_params(config),
        ),
    )
    frozen = place(tiny_policy.config, tiny_policy.params)
    adapters = lora.init_params(config, jax.random.key(3))
    adapters = jax.tree.map(lambda x: x + 0.5, adapters)
    send = actor.sender(config, frozen, learner, own)
    first, second = send(jax.tree.map(jnp.zeros_like, adapters)), send(adapters)
    want = unstack.weights(config, lora.join(tiny_policy.params, adapters))
    jax.tree.map(np.testing.assert_array_equal, second, want)
    for x in jax.tree.leaves(second):
        assert x.sharding.device_set == {*own.devices.flat}
    assert second["layers"][0]["wq"] is first["layers"][0]["wq"]
    assert "tensor" in second["layers"][0]["wq"].sharding.spec


def test_parts_of_weights_that_a_process_does_not_learn_are_refused(tiny_policy):
    learner = sharding.make_mesh(fsdp=4, rollout=4)
    own = sharding.rollout_mesh(4, 2)
    with pytest.raises(ValueError, match="process 0 draws by part 1 of the weights"):
        actor.sender(tiny_policy.config, {}, learner, own)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mesh.rollout": 1, "max_staleness": 0}, "set --config.max_staleness=1"),
        ({"objective": "rl_token"}, "objectives that may learn from older ones"),
        ({"objective": "grpo"}, "objectives that may learn from older ones"),
        ({"behavior.replay": 0.5}, "behavior.replay changes how many"),
        ({"schedules": "behavior.base:0@0,1@9"}, "behavior.base changes how many"),
        ({"behavior.base": 1.0}, "the policy itself draws no response"),
        (
            {"objective": "sft", "behavior.base": 1.0},
            "the policy itself draws no response",
        ),
        ({"mesh.rollout": 8}, "leaves none of 8 devices to learn"),
    ],
)
def test_mistakes_are_refused_before_a_folder_is_made(config, tmp_path, changes, says):
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=re.escape(says)):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def converging(config):
    """As that of loop_test, by whose measure rounds end near the target."""
    config.mesh.data, config.mesh.rollout = 1, 1
    config.samples_per_prompt, config.rollout_slots = 128, 0
    config.microbatch_size, config.pack_length = 64, 64
    config.optim.learning_rate, config.optim.schedule = 1e-2, "cosine"
    config.alpha, config.optim.clip_norm = 2.0, 0.05
    config.num_steps = config.checkpoint_every = config.eval_every = 200
    return config


def _trained(config, folder, monkeypatch, staleness) -> float:
    """Total variation from the exact target, of which the base is far."""
    config.max_staleness = staleness
    monkeypatch.setattr(actor, "AHEAD", staleness)
    rows, _ = _run(config, folder)
    assert rows[-1]["rollout/staleness_mean"] == staleness
    base, length = _distribution(config.model)
    trained, _ = _distribution(folder / "hf")
    target, _ = length_aware_target(base, length, config.alpha)
    assert total_variation(np.exp(base), target) > 0.1
    return total_variation(np.exp(trained), target)


@pytest.mark.slow
@pytest.mark.long_running
@pytest.mark.parametrize("staleness", [1, 4, 16])
def test_the_target_is_reached_however_old_responses_are(
    converging, tmp_path, monkeypatch, staleness
):
    assert _trained(converging, tmp_path / "run", monkeypatch, staleness) < 0.02
