r"""A reward of your own: the base tilted toward responses that it scores higher.

    python -m examples.own_reward

The target is p_0(y) e^{beta r(y)}, with r = 1 for a response that writes a semicolon. Where
the base does so with probability p, the target does with p e^beta / (1 - p + p e^beta): the
loop ends there, and not at a policy that writes nothing else. Takes less than a minute on a
laptop. (The trainer has the same as `--config.reward`, see docs/how-to/reward.md.)
"""

import jax
import numpy as np
import optax

import pfjax
from pfjax.targets import Target

# Of whole sequences: the reward counts once, whatever the length.
TARGET = Target(alpha=1.0, beta=2.0, has_format=False, is_length_aware=False)
PROMPTS = [f"{a}+{b}" for a in (17, 28, 39, 46) for b in (25, 36, 47, 58)]
SAMPLES, NEW_TOKENS, ROUNDS = 16, 24, 25
# Prompts have 7 tokens: any two sequences fit into a row of 64.
SHAPE = (len(PROMPTS) * SAMPLES // 2, 64)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4))


def reward_of(text: str) -> float:
    return float(";" in text)


@jax.jit
def log_prob(policy, batch):
    """Of each response, `[B, N]`."""
    return pfjax.response_sum(pfjax.log_probs(policy, batch), batch)


@jax.jit
def update(policy, opt_state, batch, log_p_base, reward):
    """One step of Adam on trajectory balance, and the loss before it."""
    groups = (batch.prompt_index // SAMPLES, len(PROMPTS))
    log_reward = TARGET.log_reward(log_p_base, batch.length, reward=reward)

    def loss_fn(policy):
        log_pf, once = log_prob(policy, batch), batch.is_real.astype("int32")
        log_z = pfjax.losses.group_log_z(log_pf, log_reward, once, *groups)
        loss = pfjax.losses.trajectory_balance(log_pf, log_reward, log_z)
        return pfjax.losses.masked_mean(loss, batch.is_real)

    loss, grads = jax.value_and_grad(loss_fn)(policy)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, policy)
    return optax.apply_updates(policy, updates), opt_state, loss


def main() -> None:
    policy = base = pfjax.load("pfjax/toy")
    opt_state = OPTIMIZER.init(policy)
    for i in range(ROUNDS):
        drawn = pfjax.rollout(policy, PROMPTS, SAMPLES, NEW_TOKENS, seed=i)
        reward = np.array([[*map(reward_of, texts)] for texts in drawn.texts])
        if i == 0:  # the policy is the base
            p = reward.mean(axis=1)
            tilted = p * np.exp(TARGET.beta) / (1 - p + p * np.exp(TARGET.beta))
            print(
                f"reward of the base {p.mean():.2f}, of the target {tilted.mean():.2f}"
            )
        batch = pfjax.pack_rollout(drawn, SHAPE)
        values = reward.ravel().astype("float32")[batch.prompt_index]
        args = (batch, log_prob(base, batch), values)
        policy, opt_state, loss = update(policy, opt_state, *args)
        print(f"round {i:2}  loss {loss:.4f}  reward {reward.mean():.2f}")


if __name__ == "__main__":
    main()
