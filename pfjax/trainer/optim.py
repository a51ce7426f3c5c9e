"""The optimiser: one optax chain for each group of parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pfjax.model.transformer import Params

# How a rate goes on after its warm-up: from the peak to zero over so many steps.
_DECAYS = {
    "cosine": optax.schedules.cosine_decay_schedule,
    "linear": lambda peak, steps: optax.schedules.linear_schedule(peak, 0.0, steps),
}


def rate(kind: str, peak: float, warmup_steps: int, num_steps: int) -> optax.Schedule:
    """The learning rate of a step from the number of steps before it.

    Neither end wastes a step on a rate of zero: the warm-up is at its peak in step
    `warmup_steps`, and a decay would be at zero in the step after the last.
    """
    warmup = max(warmup_steps, 1)
    rise = optax.schedules.linear_schedule(peak / warmup, peak, warmup - 1)
    if kind == "constant":
        return rise
    fall = _DECAYS[kind](peak, num_steps - (warmup - 1))
    return optax.schedules.join_schedules([rise, fall], [warmup - 1])


def make_optimizer(
    learning_rate: optax.Schedule,
    log_z_learning_rate: optax.Schedule,
    weight_decay: float,
    clip_norm: float,
    mu_dtype: str = "float32",
    updates_per_step: int = 1,
    average_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW for `{"policy": ..., "log_z": ...}`.

    Each group is clipped by its own global norm: the policy's update must not
    shrink because log Z' is off. log Z' is not decayed.

    Args:
      learning_rate: of the policy, by steps.
      log_z_learning_rate: about how far, in nats, one update may move log Z', whatever
        the width: Adam moves every entry of a matrix alike, so the rate there is divided
        by the inputs that an output sums over.
      weight_decay: of matrices of the policy.
      clip_norm: of each group's gradient.
      mu_dtype: of Adam's first moment.
      updates_per_step: what the optimiser counts are updates.
      average_decay: see `averaged`; 0 for no average.
    """

    def chain(of_step: optax.Schedule, decay: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(clip_norm),
            optax.adamw(
                lambda count: of_step(count // updates_per_step),
                weight_decay=decay,
                # The second stays float32: a thousandth of it, which an update may
                # add, is lost in 8 bits.
                mu_dtype=mu_dtype,
                mask=_is_matrix,
            ),
        )

    of_policy = chain(learning_rate, weight_decay)
    if average_decay:
        of_policy = optax.chain(of_policy, averaged(average_decay))
    divided = lambda u: u / u.shape[0] if u.ndim == 2 else u
    per_input = optax.stateless(lambda updates, _: jax.tree.map(divided, updates))
    groups = {
        "policy": of_policy,
        "log_z": optax.chain(chain(log_z_learning_rate, 0.0), per_input),
    }
    return optax.partition(groups, param_labels={"policy": "policy", "log_z": "log_z"})


class AverageState(NamedTuple):
    """Found in an optimiser's state by `optax.tree.get(state, "average")`."""

    average: Params


def averaged(decay: float) -> optax.GradientTransformation:
    """Keeps the exponential moving average of parameters, and leaves updates as they are.

    Args:
      decay: what the average keeps of itself in an update; it begins at the parameters.
    """

    def update(updates, state, params):
        new = optax.apply_updates(params, updates)
        average = optax.incremental_update(new, state.average, 1 - decay)
        return updates, AverageState(average)

    # Copies, as training gives the buffers of parameters away.
    init = lambda params: AverageState(jax.tree.map(jnp.copy, params))
    return optax.GradientTransformation(init, update)


def _is_matrix(params: Params) -> Params:
    """Norm scales and biases, stacked along layers or not, are not decayed."""

    def decayed(path, _):
        name = str(path[-1].key)
        is_bias = name[:2] in ("bq", "bk", "bv", "bo", "b_") or name == "bias"
        return not (is_bias or name == "scale" or "norm" in name)

    return jax.tree_util.tree_map_with_path(decayed, params)
