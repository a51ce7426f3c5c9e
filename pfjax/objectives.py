r"""The objective of a step, by name: what `--config.objective=` chooses.

An objective is a target (see `targets.py`) and a loss, which maps what is known of each
trajectory and the target's residual to `[*n]` values, unreduced. Four kinds:

- *Balance*: `powerflow`, `tb_traj`, `tb_token`, `flowrl` square the residual. `subtb`
  needs no log Z.
- *Policy gradient toward the target*: `rl_traj`, `rl_token`; the same residual as a cost,
  the group estimate of log Z being the baseline.
- *Policy gradient of a reward of the answer*: `grpo` (is it correct?), `ttrl` (is it the
  majority's?), `empo` (how many gave it?), `intuitor` (how sure were the tokens?). They
  have no target; their residual is that of PowerFlow, for comparison only.
- *Likelihood*: `sft` imitates the responses of the base or of a file. No target either.

Only `grpo`, unless given another reward, and `flowrl` read answers of the training prompts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from pfjax import losses
from pfjax.batch import PackedBatch, TrajectoryStats
from pfjax.targets import Array, Target, tokens


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Names the objective and holds its constants. Hashable: a static argument."""

    name: str = "powerflow"
    # Of the target; with a schedule numbers of the step, traced in `train_step`.
    alpha: Any = 4.0
    log_z: str = "head"  # "head" or "group", where the objective leaves the choice
    beta: Any = 0.0  # of the reward in the target
    # Terms of the reward that tilts the target or that policy gradients follow, see
    # `reward_functions.parse`; "" for the objective's own, if it has one.
    reward: str = ""
    reward_per: str = "response"  # or "token"; in length-aware targets
    temperature: float = 1.0  # that responses are sampled at
    divergence: float = 1.0  # order of the loss of a residual; 1 squares it
    residual_clip: Any = None  # nats per token, beyond which that loss is linear
    # Below alpha 1, under which tokens are rare and keep the power 1, see `targets.rare`.
    eta_cutoff: float = 0.0
    kl: float = 0.0  # of KL(pi || p_0) per token, in the objectives of a reward
    clip_low: float = 0.8  # of ratios pi / pi_old
    clip_high: float = 1.28
    mask_clipped_tokens: bool = False  # leave tokens out whose ratio is outside
    advantage: str = "group"  # what rewards become, see `rewards.advantages`
    loss_aggregation: str = (
        "response"  # what sums over tokens are divided by, see `grpo`
    )
    max_new_tokens: int = 3072  # the constant among these divisors
    own: Any = (
        None  # an Objective of a person's own, which `name` only says where to find
    )

    @property
    def kind(self) -> "Objective":
        return self.own or OBJECTIVES[self.name]

    @property
    def reward_source(self) -> str:
        """The terms of the reward that is computed, "" for none."""
        return self.reward or self.kind.reward

    @property
    def is_balance(self) -> bool:
        """Whether the optimum is the same whatever distribution responses come from."""
        return self.kind.loss in (balance, subtb)

    @property
    def has_residual_loss(self) -> bool:
        """Whether its loss is a `losses.divergence` of the residual."""
        return self.kind.loss is balance

    @property
    def has_target(self) -> bool:
        """Whether it trains toward a target, not for a reward or a likelihood alone."""
        return not (self.has_advantages or self.is_likelihood)

    @property
    def is_tilted(self) -> bool:
        """Whether the reward is part of the target."""
        return bool(self.reward_source) and self.has_target

    @property
    def has_advantages(self) -> bool:
        """Whether it is a policy gradient of a reward, which it makes advantages of."""
        return self.kind.loss in (grpo, empo)

    @property
    def is_likelihood(self) -> bool:
        """Whether it imitates the responses, none of which may then be the policy's own."""
        return self.kind.loss is sft

    @property
    def target(self) -> Target:
        """The target of training; PowerFlow's for objectives without one."""
        return self.kind.target(self)

    @property
    def log_z_source(self) -> str:
        """Where log Z comes from: "head", "group" or "none"."""
        wanted = self.kind.log_z
        return self.log_z if wanted == "any" else wanted


_Loss = Callable[[TrajectoryStats, ObjectiveConfig], Float[Array, "*n"]]


class Objective(NamedTuple):
    loss: _Loss  # reads the residual of the target
    target: Callable[[ObjectiveConfig], Target] = lambda c: _power(c)
    log_z: str = "any"  # "any": as the config says; else "group" or "none"
    reward: str = ""  # its own, where none is chosen; normalised in groups
    has_prefixes: bool = False  # reads `prefix_variance`


def _power(c: ObjectiveConfig, **how: Any) -> Target:
    """p_0^alpha, with e^{beta r} if a reward is named."""
    per_token = c.reward_per == "token"
    beta = c.beta if c.reward else 0.0
    how = {"is_reward_per_token": per_token, "eta_cutoff": c.eta_cutoff, **how}
    return Target(c.alpha, beta, **how)


def tilt(y: TrajectoryStats | PackedBatch) -> dict[str, Any]:
    """What a target of these trajectories has beside the base: arguments of `Target`."""
    out = {"psi": y.psi, "reward": 0.0 if y.reward is None else y.reward}
    return out if y.log_p_rare is None else out | {"log_p_rare": y.log_p_rare}


def at_alpha(c: ObjectiveConfig, y: TrajectoryStats | PackedBatch) -> ObjectiveConfig:
    """The objective of trajectories, with their own alphas where they have some."""
    return c if y.alpha is None else dataclasses.replace(c, alpha=y.alpha)


def add_loss(y: TrajectoryStats, c: ObjectiveConfig) -> TrajectoryStats:
    """Fills in `residual` and `loss`."""
    c = at_alpha(c, y)
    sums = (y.log_pf, y.log_p_base, y.num_loss_tokens)
    y = y._replace(residual=c.target.residual(*sums, y.log_z, **tilt(y)))
    if y.alpha is None:
        return y._replace(loss=c.kind.loss(y, c))
    # Residuals grow with alpha; the optimum of each stays.
    scale = jnp.maximum(y.alpha, 1)
    clip = None if c.residual_clip is None else c.residual_clip * scale
    loss = c.kind.loss(y, dataclasses.replace(c, residual_clip=clip))
    return y._replace(loss=loss / scale**2)


def balance(y: TrajectoryStats, c: ObjectiveConfig) -> Float[Array, "*n"]:
    r"""Squares the residual, or takes another `losses.divergence` of it; linear far off, with
    `residual_clip`.

    .. math:: w\,(\log Z + \log\pi - \log R)^2,\quad\text{or}\quad
              w\,(\log Z' + \tfrac1{|y|}(\log\pi - \log R))^2

    - `powerflow`: length-aware, :math:`R = p_0^\alpha e^{\alpha\psi|y|}`; with alpha = 1 only the
      format is trained. PowerFlow, arXiv 2603.18363, Eq. 10; `losses.powerflow` is the
      same for other trainers.
    - `tb_token`: the same without psi. PowerFlow's ablation "TB-token", whose formula is
      not given; this is our reading.
    - `tb_traj`: whole sequences, :math:`R = p_0^\alpha`; collapses onto short responses. PowerFlow,
      Eq. 5 and its ablation "TB-traj".
    - `flowrl`: length-aware, :math:`R = p_0 e^{\beta A|y|}`, A the group-normalised correctness.
      FlowRL, arXiv 2509.15207, Eq. 6.
    """
    clip = c.residual_clip
    if clip is not None and not c.target.is_length_aware:
        clip = clip * tokens(y.num_loss_tokens)
    return y.weight * losses.divergence(y.residual, c.divergence, clip)


def policy_gradient(y: TrajectoryStats, c: ObjectiveConfig) -> Float[Array, "*n"]:
    r"""Policy gradient with the residual as the cost of a response.

    .. math:: w\,\mathrm{sg}[\text{residual}]\,\log\pi

    - `rl_traj`: whole sequences; -KL(pi || p_0^alpha / Z), that is the sequence's log p_0
      as reward with KL to p_0 of weight 1/(alpha - 1). Half the gradient of `tb_traj` with
      the group estimate of log Z. PowerFlow's ablation "RL-traj"; our reading.
    - `rl_token`: means over tokens; reward (1/|y|) log p_0, the mean over tokens of
      log pi/p_0 as its penalty. The penalty's own gradient, (1/|y|), vanishes for sums over
      tokens but not for means: the optimum p_0^alpha e^{-mu |y|} sums to e before the
      target's `log_sum` of 1 is taken off, where PowerFlow's sums to 1. PowerFlow's
      ablation "RL-token"; our reading.
    """
    return y.weight * lax.stop_gradient(y.residual) * y.log_pf


def subtb(y: TrajectoryStats, c: ObjectiveConfig) -> Float[Array, "*n"]:
    r"""Balances every sub-trajectory of a response, where every prefix may stop.

    With u_t the residual log pi - alpha log p_0 of the first t tokens followed by a stop,

    .. math:: w\,\mathrm{mean}_{i<j}\,(u_i - u_j)^2 = 2 w\,\mathrm{Var}_t\,u_t

    Sums of flow differences over a stretch telescope to u_i - u_j, so that all pairs cost
    no more than a variance, and no log Z is left. The optimum is p_0^alpha / Z.

    References:
      Madan et al., arXiv 2209.12782; Hu et al., arXiv 2310.04363, Eq. 3.
    """
    return y.weight * 2 * y.prefix_variance


def grpo(y: TrajectoryStats, c: ObjectiveConfig) -> Float[Array, "*n"]:
    r"""Clips the policy gradient of an advantage, token by token.

    .. math:: -\tfrac1N\sum_t \min(\rho_t A,\ \mathrm{clip}(\rho_t, low, high) A)
              + \tfrac kN\sum_t (p_0/\pi - \log(p_0/\pi) - 1)_t

    N is by `loss_aggregation`:

    - `response`: :math:`|y|`, so that each response counts alike, and the tokens of a long
      one less (GRPO).
    - `token`: the mean of :math:`|y|` over the responses of the update, so that each of its
      tokens counts alike (DAPO).
    - `constant`: `max_new_tokens`, likewise whatever other responses are like (Dr. GRPO).

    Tokens that `mask_clipped_tokens` leaves out count in the last two.

    References:
      GRPO, arXiv 2402.03300, Eq. 3; DAPO, arXiv 2503.14476, Eq. 8; Dr. GRPO, arXiv
      2503.20783; with the rewards of `ttrl` (arXiv 2504.16084) and `intuitor` (arXiv
      2505.19590).
    """
    n = _divisor(y, c)
    return _surrogate(y, c, y.capped / n, y.floored / n)


def empo(y: TrajectoryStats, c: ObjectiveConfig) -> Float[Array, "*n"]:
    r"""Clips like `grpo`, with one ratio per sequence, the geometric mean of its tokens'.

    .. math:: -\min(s A,\ \mathrm{clip}(s, low, high) A),\quad
              s = (\pi/\pi_{old})^{1/|y|}

    With another `loss_aggregation` than `response` a token of the response has this loss,
    and their sum is divided as in `grpo`.

    References:
      EMPO, arXiv 2504.05812; the ratio is GSPO's, as in its recipe.
    """
    n = tokens(y.num_loss_tokens)
    ratio = jnp.exp(y.log_ratio / n)
    capped, floored = jnp.minimum(ratio, c.clip_high), jnp.maximum(ratio, c.clip_low)
    weight = n / _divisor(y, c)
    return _surrogate(y, c, weight * capped, weight * floored)


def sft(y: TrajectoryStats, c: ObjectiveConfig) -> Float[Array, "*n"]:
    r"""Negative log-likelihood of the responses, whoever drew them.

    .. math:: -\tfrac1N \log\pi(y)

    N is the mean of :math:`|y|` over the responses of the update, so that its mean over them
    is the cross-entropy per token. The optimum is the distribution q that they are drawn
    from; if each were divided by its own :math:`|y|`, it would be :math:`q / |y|`, normalised.
    Of the policy's own samples the mean gradient is 0. What q is makes the method:

    - the base at a low temperature: simple self-distillation, arXiv 2604.01193;
    - the power distribution: power self-distillation, arXiv 2605.04542;
    - the likeliest under the base of N samples: SFT-sharpening, arXiv 2412.01951.
    """
    return -y.log_pf / tokens(y.mean_length)


def _divisor(y: TrajectoryStats, c: ObjectiveConfig) -> Array | int:
    """What a sum over the tokens of a response is divided by. The mean over the responses
    of an update comes after it, so that a mean length divides by all tokens."""
    if c.loss_aggregation == "constant":
        return c.max_new_tokens
    is_token = c.loss_aggregation == "token"
    return tokens(y.mean_length if is_token else y.num_loss_tokens)


def _surrogate(
    y: TrajectoryStats, c: ObjectiveConfig, capped: Array, floored: Array
) -> Float[Array, "*n"]:
    """PPO's pessimistic clipped surrogate, and the KL penalty: ratios are capped where the
    advantage is positive, floored where it is negative."""
    gain = y.reward * jnp.where(y.reward >= 0, capped, floored)
    return c.kl * y.kl / _divisor(y, c) - gain


def _sequence_target(c: ObjectiveConfig) -> Target:
    return _power(c, has_format=False, is_length_aware=False)


OBJECTIVES: dict[str, Objective] = {
    "powerflow": Objective(balance),
    "tb_traj": Objective(balance, _sequence_target),
    "tb_token": Objective(balance, lambda c: _power(c, has_format=False)),
    "rl_traj": Objective(policy_gradient, _sequence_target, log_z="group"),
    "rl_token": Objective(
        policy_gradient,
        lambda c: _power(c, has_format=False, log_sum=1.0),
        log_z="group",
    ),
    "subtb": Objective(subtb, _sequence_target, log_z="none", has_prefixes=True),
    "flowrl": Objective(
        balance,
        lambda c: Target(1.0, c.beta, has_format=False, is_reward_per_token=True),
        reward="accuracy",
    ),
    "grpo": Objective(grpo, log_z="none", reward="accuracy"),
    "ttrl": Objective(grpo, log_z="none", reward="majority"),
    "empo": Objective(empo, log_z="none", reward="cluster"),
    "intuitor": Objective(grpo, log_z="none", reward="self_certainty"),
    "sft": Objective(sft, log_z="none"),
}
