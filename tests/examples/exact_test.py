"""The exact match of a policy with its target: by hand, and on the toy task's list."""

import math

import numpy as np
import pytest

import pfjax
from examples import exact, toy_model
from examples.worlds import exact as of_worlds
from pfjax.targets import Target

LENGTH = np.array([1, 2, 3])
P0 = np.array([0.5, 0.3, 0.2])
REWARD = np.array([0.0, -1.0, -0.5])
WHOLE = {"is_length_aware": False}


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("more", [{}, WHOLE, {"is_reward_per_token": True}])
@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_the_target_itself_matches(alpha, beta, more):
    target = Target(alpha, beta, **more)
    _, log_p = of_worlds.target_on(np.log(P0), LENGTH, target, REWARD)
    assert np.exp(log_p).sum() == pytest.approx(1)
    found = exact.measure(np.log(P0), log_p, LENGTH, target, REWARD == 0, REWARD)
    assert found.total_variation == pytest.approx(0, abs=1e-9)
    assert found.kl_policy_target == pytest.approx(0, abs=1e-9)
    assert found.kl_target_policy == pytest.approx(0, abs=1e-9)
    assert (found.exponent, found.exponent_target) == pytest.approx((alpha, alpha))
    assert found.inversion_rate == 0
    assert found.policy_accuracy == pytest.approx(found.target_accuracy)


def test_a_policy_by_hand():
    # p_0 squared is 1/4 and 1/16, of 1 and 2 tokens: with x = e^{-log Z'} the sum
    # x/4 + x^2/16 is 1 at x = 2 (sqrt 5 - 1), the terms 0.618 and 0.382.
    log_p0, length = np.log([0.5, 0.25]), np.array([1, 2])
    found = exact.measure(log_p0, log_p0, length, Target(2.0), np.array([True, False]))
    golden = (math.sqrt(5) - 1) / 2
    log_x = math.log(4 * golden)
    assert found.log_z == pytest.approx(-log_x)
    assert (found.base_mass, found.policy_mass) == pytest.approx((0.75, 0.75))
    # (|0.5 - 0.618| + |0.25 - 0.382| + the 0.25 that is not listed) / 2
    assert found.total_variation == pytest.approx(0.25)
    # The policy, given that it is listed, is 2/3 and 1/3.
    kl = 2 / 3 * math.log(2 / 3 / golden) + 1 / 3 * math.log(1 / 3 / (1 - golden))
    assert found.kl_policy_target == pytest.approx(kl)
    kl = golden * math.log(golden / 0.5) + (1 - golden) * math.log((1 - golden) / 0.25)
    assert found.kl_target_policy == pytest.approx(kl)
    # log pi + log Z' |y| differs by log 2 + log x, log p_0 by log 2.
    assert found.exponent == pytest.approx(1 + log_x / math.log(2))
    accuracy = (found.base_accuracy, found.policy_accuracy, found.target_accuracy)
    assert accuracy == pytest.approx((0.5, 0.5, golden))


def test_exponents_weigh_by_base_and_by_target():
    log2_p0, log2_pi = np.array([-1.0, -2.0, -3.0]), np.array([0.0, -1.0, -4.0])
    scale = math.log(2)
    found = exact.measure(
        scale * log2_p0, scale * log2_pi, LENGTH, Target(2.0, **WHOLE), LENGTH == 1
    )
    # Powers of 2: the base's mass is 4:2:1, that of its square 16:4:1.
    for name, mass in {"exponent": [4, 2, 1], "exponent_target": [16, 4, 1]}.items():
        slope = np.polyfit(log2_p0, log2_pi, 1, w=np.sqrt(mass))[0]
        assert getattr(found, name) == pytest.approx(slope)


def test_a_verifier_takes_beta_nats_from_what_fails():
    target = Target(1.0, math.log(3), **WHOLE)
    reward = np.array([0.0, -1.0])
    _, log_p = of_worlds.target_on(np.log([0.5, 0.5]), LENGTH[:2], target, reward)
    np.testing.assert_allclose(np.exp(log_p), [0.75, 0.25])


def test_inversions_are_of_pairs_that_the_policy_draws():
    policy, wanted = np.log([0.5, 0.3, 0.2]), np.log([0.3, 0.5, 0.2])
    # The pairs have 0.15, 0.1 and 0.06; the first is inverted.
    assert exact.inversion_rate(policy, wanted) == pytest.approx(0.15 / 0.31)
    # What one of the two does not rank is left out: 0.1 and 0.06 are ranked alike.
    assert exact.inversion_rate(policy, np.log([0.4, 0.4, 0.2])) == 0


def test_the_list_holds_all_that_the_toys_generator_samples(rng):
    problem = toy_model.all_problems()[17]
    found = {r.text: r.probability for r in exact.list_responses(problem)}
    assert len(found) == 402 and math.isclose(sum(found.values()), 1)
    drawn = [toy_model.sample_response(problem, rng) for _ in range(1000)]
    assert set(drawn) <= found.keys()
    guess = max(found, key=found.get)
    assert drawn.count(guess) / 1000 == pytest.approx(found[guess], abs=0.05)


def test_the_toy_is_its_own_power_of_1():
    base = pfjax.load("pfjax/toy")
    problems = toy_model.split_problems(0).held_out[:2]
    listed = exact.listed(exact.WORLDS["toy"], base, problems)
    rows = exact.measure_all(base, base, listed, Target(1.0))
    found = exact.mean(rows)
    assert 0.97 < found.base_mass < 1
    # All that is left is what the base says beside the list.
    assert found.total_variation == pytest.approx(1 - found.base_mass, abs=1e-4)
    assert found.exponent == pytest.approx(1, abs=0.02)
    assert found.policy_accuracy == pytest.approx(0.7 * 0.64 + 0.3 * 0.4, abs=0.06)
    text = exact.table([p.prompt for p in problems], rows)
    assert len(text.splitlines()) == 5 and problems[0].prompt in text
