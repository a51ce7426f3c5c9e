r"""A loss of your own in an optax loop: PowerFlow's residual in a Huber loss.

    python -m examples.own_loss

Sharpens the toy model on 16 sums. A round draws responses, scores them under the base, and
makes two updates on them. What falls with the loss is the spread of the residual within a
prompt, in nats per token: it is 0 where the policy is the target. Takes less than a minute
on a laptop.
"""

import jax
import numpy as np
import optax

import pfjax
from pfjax.targets import Target

TARGET = Target(alpha=4.0, has_format=False)
PROMPTS = [f"{a}+{b}" for a in (17, 28, 39, 46) for b in (25, 36, 47, 58)]
SAMPLES, NEW_TOKENS, ROUNDS, UPDATES = 16, 24, 20, 2
# Prompts have 7 tokens: any two sequences fit into a row of 64.
SHAPE = (len(PROMPTS) * SAMPLES // 2, 64)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.05), optax.adam(4e-4))


@jax.jit
def log_prob(policy, batch):
    """Of each response, `[B, N]`."""
    return pfjax.response_sum(pfjax.log_probs(policy, batch), batch)


def loss_fn(policy, batch, log_p_base):
    """The loss, and the spread of the residual."""
    log_pf, length = log_prob(policy, batch), batch.length
    log_reward = TARGET.log_reward(log_p_base, length)
    groups = (batch.prompt_index // SAMPLES, len(PROMPTS))
    log_z = pfjax.losses.group_log_z(log_pf, log_reward, length, *groups)
    residual = TARGET.residual(log_pf, log_p_base, length, log_z)
    mean = lambda x: pfjax.losses.masked_mean(x, batch.is_real)
    return mean(optax.losses.huber_loss(residual)), mean(residual**2) ** 0.5


@jax.jit
def update(policy, opt_state, batch, log_p_base):
    """One step of Adam, and what `loss_fn` was before it."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, spread), grads = grad_fn(policy, batch, log_p_base)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, policy)
    return optax.apply_updates(policy, updates), opt_state, loss, spread


def accuracy(texts):
    """The fraction of responses with the right sum in their box."""
    sums = [sum(map(int, prompt.split("+"))) for prompt in PROMPTS]
    pairs = zip(sums, texts, strict=True)
    return np.mean([f"{{{n}}}" in text for n, of_prompt in pairs for text in of_prompt])


def main() -> None:
    policy = base = pfjax.load("pfjax/toy")
    opt_state = OPTIMIZER.init(policy)
    for i in range(ROUNDS):
        drawn = pfjax.rollout(policy, PROMPTS, SAMPLES, NEW_TOKENS, seed=i)
        batch = pfjax.pack_rollout(drawn, SHAPE)
        log_p_base, seen = log_prob(base, batch), []
        for _ in range(UPDATES):
            policy, opt_state, *values = update(policy, opt_state, batch, log_p_base)
            seen.append(values)
        loss, spread = seen[0]  # of responses that it was not yet trained on
        correct = f"correct {accuracy(drawn.texts):.2f}"
        print(f"round {i:2}  loss {loss:.4f}  spread {spread:.3f}  {correct}")


if __name__ == "__main__":
    main()
