r"""Every metric that a run writes, described once: its formula, what it tells, and what a
good value looks like.

The page of metrics in docs/ is made from here, and a test compares the keys with those of
runs. Formulas are LaTeX. Means are over the responses of a step (E) unless a prompt is
named; sums over t run over the tokens of a response, its stop token included. In what
follows m and m_0 are the log-probs per token of policy and base, and delta is the residual
of the target (see `targets.Target.residual`). What cannot be known is left out: a spread
among the responses to a prompt that has one, an error over one prompt.
"""

import re
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """What one key of `metrics.jsonl` means."""

    about: str
    formula: str = ""
    good: str = ""
    when: str = ""  # what a run must have for it to be there; "": every run has it


_REWARD = "a reward"
_GOLD = "evaluation prompts with answers"
_TARGET = "`data.target`"
_BASE = "`behavior.base`"
_STALE = "`max_staleness` above 0"

METRICS: dict[str, Metric] = {
    # The balance of a step.
    "tb/loss": Metric(
        "loss of the objective, mean over responses; linear beyond `residual_clip`",
        r"\mathbb{E}[w\,\delta^2]",
        "falls, then stays; for objectives of a reward its value means little",
    ),
    "tb/residual_mean": Metric(
        "mean residual: how far log Z' is off on average",
        r"\mathbb{E}[\delta]",
        "near 0 from the first step on, since log Z' is calibrated there",
    ),
    "tb/residual_std": Metric(
        "spread of the residual over all responses",
        r"\sqrt{\mathrm{Var}[\delta]}",
        "falls; it starts near |alpha - 1| times the spread of log p_0 per token",
    ),
    "tb/residual_p95_abs": Metric(
        "tail of the residual: rare responses that are far from the target",
        r"Q_{0.95}[\,\lvert\delta\rvert\,]",
        "falls; a jump before a spike of the loss names the cause",
    ),
    "tb/residual_std_within_prompt": Metric(
        "spread of the residual among the responses to one prompt, free of errors of log Z'",
        r"\sqrt{\mathbb{E}_q\,\mathrm{Var}_{y\mid q}[\delta]}",
        "falls; this is the mismatch that training removes",
    ),
    "tb/logz_mean": Metric(
        "log Z' of the prompts, nats per token (per response for whole-sequence targets)",
        r"\mathbb{E}_q[\log Z'(q)]",
        "negative for alpha > 1, positive for alpha < 1; settles",
    ),
    "tb/logz_std": Metric(
        "how much log Z' differs between prompts",
        r"\sqrt{\mathrm{Var}_q[\log Z'(q)]}",
        "grows from 0 as the head learns to tell prompts apart",
    ),
    "tb/logz_gap": Metric(
        "distance of log Z' from the group estimate of each prompt",
        r"\mathbb{E}_q\,\lvert\mathbb{E}_{y\mid q}[\delta]\rvert",
        "small beside tb/residual_std_within_prompt; 0 with log_z=group",
    ),
    # The match with the target.
    "tb/corr_logp_target": Metric(
        "Pearson correlation of log pi with the target's log density, within prompts",
        r"\mathrm{corr}_{y\mid q}(\log\pi,\ \log\tilde p)",
        "near 1 at the start, where the policy is the base, and again at the end",
    ),
    "tb/rank_corr": Metric(
        "Spearman correlation of the same",
        r"\mathrm{corr}_{y\mid q}(\mathrm{rank}\log\pi,\ \mathrm{rank}\log\tilde p)",
        "as above; noisy once a prompt's responses are nearly alike",
    ),
    "tb/slope": Metric(
        "least-squares slope of log pi on the target's log density, within prompts",
        r"\mathrm{Cov}_{y\mid q}(\log\pi, \log\tilde p)\,/\,\mathrm{Var}_{y\mid q}(\log\tilde p)",
        "from 1/alpha at the start toward 1",
    ),
    "tb/elbo": Metric(
        "bound on the log of the target's sum, at the group estimate of log Z'; blind to "
        "what is never sampled",
        r"\mathbb{E}_\pi[\log\tilde p(y) - \log\pi(y)]",
        "toward 0, from either side, for length-aware targets; rises toward log Z otherwise",
        when="`temperature` 1 and `max_staleness` 0",
    ),
    "tb/ess": Metric(
        "effective sample size of a prompt's responses as samples of the target, a fraction",
        r"\frac{(\sum_i w_i)^2}{n\sum_i w_i^2},\quad w_i = e^{-\delta_i}",
        "toward 1",
        when="`temperature` 1 and `max_staleness` 0",
    ),
    "tb/inversion_rate": Metric(
        "fraction of pairs of a prompt's responses that policy and target order differently",
        r"\Pr[(\log\pi(y)-\log\pi(y'))\,(\log\tilde p(y)-\log\tilde p(y')) \lt 0]",
        "falls; responses that the target hardly tells apart keep it above 0",
    ),
    "tb/exponent": Metric(
        "power of the base that the policy is: slope of log pi, less what else the target "
        "holds, on log p_0, over all responses of the step; its standard error is "
        "tb/exponent_se",
        r"\mathrm{slope}_{y\mid q}(\log\pi - \log\tilde p + \alpha\log p_0,\ \log p_0)",
        "toward alpha (with alpha_range it is divided by each prompt's, toward 1); over the "
        "policy's own samples alone, which are much alike, it is noisy and says nothing of the "
        "rest",
    ),
    "tb/exponent_se": Metric("standard error of tb/exponent over prompts"),
    "tb/exponent_base": Metric(
        "the same over the responses that the base has drawn, so weighted by its mass",
        "",
        "toward alpha",
        _BASE,
    ),
    "tb/exponent_base_se": Metric(
        "standard error of tb/exponent_base over prompts", when=_BASE
    ),
    "target/alpha": Metric(
        "power of the base in the target of this step", "", "", "`schedules` of alpha"
    ),
    "target/beta": Metric(
        "weight of the reward in the target of this step", "", "", "`schedules` of beta"
    ),
    # Policy and base.
    "policy/logp_per_token": Metric(
        "log-prob of the responses under the policy, nats per token",
        r"\mathbb{E}[m],\quad m = \tfrac{1}{\lvert y\rvert}\log\pi(y\mid q)",
        "rises toward 0 for alpha > 1, falls for alpha < 1",
    ),
    "base/logp_per_token": Metric(
        "log-prob of the same responses under the frozen base",
        r"\mathbb{E}[m_0],\quad m_0 = \tfrac{1}{\lvert y\rvert}\log p_0(y\mid q)",
        "rises for alpha > 1; a fall means that the policy leaves the base",
    ),
    "kl/policy_base_per_token": Metric(
        "distance from the base: KL divergence of the policy, nats per token",
        r"\mathbb{E}[m - m_0]",
        "grows, then stays; growth without end is drift",
    ),
    "entropy": Metric(
        "entropy of the next token under the policy, over all response tokens, nats",
        r"\frac{1}{T}\sum_t H(\pi(\cdot\mid y_{\lt t}))",
        "falls for alpha > 1 and stays above 0, rises for alpha < 1",
    ),
    "is/w_mean": Metric(
        "mean importance weight",
        r"\mathbb{E}[w],\quad w = \mathrm{clip}(\pi/\pi_{old})",
        "1 with one update per rollout",
    ),
    "is/w_at_clamp_frac": Metric(
        "fraction of importance weights at an end of the clip range",
        r"\Pr[w \in \{low, high\}]",
        "0 with one update per rollout; near 1 when a step moves the policy far",
    ),
    "is/keep_frac": Metric(
        "fraction of response tokens that enter the loss",
        "",
        "1, unless mask_clipped_tokens leaves some out",
    ),
    # The responses of a step.
    "completions/mean_length": Metric(
        "mean length in tokens",
        r"\mathbb{E}\lvert y\rvert",
        "holds; below a quarter of its start health_checks stop the run",
    ),
    "completions/max_length": Metric(
        "longest response", "", "below max_new_tokens, or responses are cut"
    ),
    "completions/mean_terminated_length": Metric(
        "mean length of the responses that ended by themselves",
        "",
        "near completions/mean_length",
    ),
    "completions/clipped_ratio": Metric(
        "fraction of responses cut at max_new_tokens",
        "",
        "near 0; cut responses have not paid for a stop token and distort the match",
    ),
    "completions/boxed_frac": Metric(
        r"fraction of responses with a closed \boxed{}",
        "",
        "toward 1 where the format term is on",
    ),
    "completions/rare_frac": Metric(
        "fraction of responses with a token that is rare under the base",
        "",
        "falls toward the base's; if most have one, eta_cutoff is too high: good words count "
        "as rare",
        "`eta_cutoff` above 0",
    ),
    "completions/repeats_across_prompts": Metric(
        "fraction of responses that another prompt of the step got too",
        "",
        "stays near its value at step 1; a rise means that the policy says one thing to all",
    ),
    "num_tokens": Metric("response tokens of the step", r"\sum\lvert y\rvert"),
    "repetition/ngram_frac": Metric(
        "fraction of token 4-grams that repeat earlier ones of their response",
        "",
        "stays near its value at step 1",
    ),
    "repetition/loop_frac": Metric(
        "fraction of responses whose end is one period, at most 64 tokens, four times over",
        "",
        "near 0; a rise is the degenerate optimum of sharpening",
    ),
    "reward/mean": Metric(
        "mean reward", r"\mathbb{E}[r]", "rises; constant reward is warned of", _REWARD
    ),
    "reward/failed": Metric(
        "responses whose reward a function failed to give: they get the worst of the step",
        good="0",
        when="a reward function",
    ),
    "reward/std": Metric(
        "standard deviation of the reward among a prompt's responses, mean over prompts",
        r"\mathbb{E}_q\sqrt{\mathrm{Var}_{y\mid q}[r]}",
        "above 0: where it is 0 the prompt teaches nothing",
        _REWARD,
    ),
    "reward/min": Metric("least reward", when=_REWARD),
    "reward/max": Metric("greatest reward", when=_REWARD),
    # The sampler against the scorer.
    "rollout/kl": Metric(
        "divergence of the log-probs sampled with from those trained with, nats per token",
        r"\frac{1}{T}\sum_t (\log\pi_{sampler} - \log\pi_{scorer})",
        "1e-6 in float32, below 0.01 in bfloat16; above 0.05 health_checks stop the run",
    ),
    "rollout/logp_gap_mean": Metric(
        "mean distance of the same, token by token",
        r"\frac{1}{T}\sum_t \lvert\log\pi_{sampler} - \log\pi_{scorer}\rvert",
        "1e-6 in float32; up to 0.1 in bfloat16",
    ),
    "rollout/logp_gap_max": Metric("largest distance of the same"),
    "rollout/waste": Metric(
        "fraction of the sampler's slots and steps that drew no token",
        r"1 - \frac{\text{tokens drawn}}{\text{slots}\times\text{steps}}",
        "below 0.2 with refills; lower `rollout_slots` trades speed for it",
    ),
    "rollout/staleness_mean": Metric(
        "steps that the weights which drew a token are behind those it trains, mean over "
        "tokens",
        "",
        "1 with `mesh.rollout` and responses that end in their step; more where they go on",
        when=_STALE,
    ),
    "rollout/staleness_max": Metric(
        "the most of them", "", "at most `max_staleness`", when=_STALE
    ),
    # The optimiser.
    "lr": Metric("learning rate of the policy at this step"),
    "grad_norm": Metric(
        "norm of the policy's gradient before clipping",
        r"\lVert\nabla_\theta L\rVert",
        "steady; compare with optim.clip_norm",
    ),
    "log_z_grad_norm": Metric(
        "norm of the log Z' head's gradient before clipping",
        r"\lVert\nabla_\phi L\rVert",
        "falls; 0 without a head",
    ),
    # Cost.
    "pack/fill": Metric(
        "fraction of the packed rows' tokens that are real",
        "",
        "above 0.7; a longer pack_length fills better",
    ),
    "time/step": Metric("seconds of the step"),
    "time/rollout": Metric(
        "seconds of sampling; with `mesh.rollout` those that learning waits for it"
    ),
    "time/actor": Metric(
        "seconds of sampling, beside learning with `mesh.rollout`", when=_STALE
    ),
    "time/actor_idle": Metric(
        "seconds that sampling waited for weights before that", when=_STALE
    ),
    "time/reward": Metric("seconds of decoding and grading"),
    "time/base_pass": Metric("seconds of packing and of the base's log-probs"),
    "time/update": Metric("seconds of the gradients and the optimiser"),
    "time/compile": Metric(
        "seconds of compilation, part of the others", "", "0 after the first steps"
    ),
    "time/eval": Metric("seconds of the evaluation"),
    "perf/tokens_per_s": Metric(
        "response tokens per second of the whole step", r"\sum\lvert y\rvert / t_{step}"
    ),
    "perf/mfu": Metric(
        "fraction of the devices' peak FLOP/s that base pass and update reach",
        "",
        "0.35 to 0.5; what is compiled in a step counts against it",
        "devices of known peak",
    ),
    "evaluation/fingerprint": Metric(
        "a number that evaluations share which asked the same (prompts, samples, how they are "
        "drawn): only those are compared"
    ),
    # Evaluation: of the policy, on held-out prompts, k samples each.
    "eval/avg@k": Metric(
        "mean accuracy over prompts and their k samples",
        r"\frac{1}{P}\sum_q \frac{c_q}{k}",
        "rises by more than its standard error",
        _GOLD,
    ),
    "eval/avg@k_se": Metric(
        "standard error of avg@k over prompts",
        r"\mathrm{sd}_q(c_q / k)\,/\,\sqrt{P}",
        "",
        _GOLD,
    ),
    "eval/maj@k": Metric(
        "accuracy of the majority's answer, over classes of equal answers",
        "",
        "above avg@k; sharpening brings the two together",
        _GOLD,
    ),
    "eval/pass@k": Metric(
        "fraction of prompts with a correct sample among k (unbiased for fewer than drawn)",
        r"1 - \binom{n-c}{k} / \binom{n}{k}",
        "holds; a fall is the loss of diversity that sharpening risks",
        _GOLD,
    ),
    "eval/answer_classes": Metric(
        "different answers per prompt", "", "falls for alpha > 1", _GOLD
    ),
    "eval/answer_entropy": Metric(
        "entropy of a prompt's answers, nats",
        r"-\sum_c f_c\log f_c",
        "falls for alpha > 1",
        _GOLD,
    ),
    "eval/grader_timeouts": Metric(
        "answers whose comparison ran out of time, since the start", "", "0", _GOLD
    ),
    "eval/length_mean": Metric("mean length in tokens", "", "holds"),
    "eval/truncated": Metric("fraction of responses cut at the limit", "", "near 0"),
    "eval/boxed_frac": Metric("fraction of responses with an answer in a box"),
    "eval/distinct": Metric(
        "different texts among a prompt's k samples, as a fraction",
        "",
        "falls for alpha > 1, rises for alpha < 1",
    ),
    "eval/elbo": Metric(
        "lower bound on the log of the target's sum, from samples of the policy",
        r"\mathbb{E}_\pi[\log\tilde p - \log\pi]",
        "rises until it meets eval/eubo",
        _TARGET,
    ),
    "eval/eubo": Metric(
        "upper bound on the same, from samples of the target",
        r"\mathbb{E}_{\tilde p / Z}[\log\tilde p - \log\pi]",
        "falls; the gap to eval/elbo is KL(pi || target) + KL(target || pi)",
        _TARGET,
    ),
}


def described(key: str) -> str:
    """The key of `METRICS` that describes one of `metrics.jsonl`, which may name a set of
    prompts and a number of samples.

    >>> described("eval/math500/avg@16_se"), described("tb/loss")
    ('eval/avg@k_se', 'tb/loss')
    """
    first, _, last = re.sub(r"@\d+", "@k", key).rpartition("/")
    return "eval/" + last if first.startswith("eval/") else f"{first}/{last}".strip("/")


def names(sets: list[str], graded: list[str], k: int, has_target: bool) -> list[str]:
    """The keys that a run may write.

    Args:
      sets: of its evaluations; where there are several, `eval/avg@k` stands for the mean
        over them (see `value_of`).
      graded: those of them that have answers.
      k: samples per prompt in evaluations.
      has_target: whether there are samples of the target.
    """
    out = []
    for key, metric in METRICS.items():
        group, _, last = key.partition("/")
        last, measured = last.replace("@k", f"@{k}"), sets
        if metric.when == _GOLD:
            measured = graded
        if group != "eval":
            out.append(key)
        elif metric.when == _TARGET:
            out += [key] if has_target else []
        elif measured:
            of_each = [f"eval/{x}/{last}" for x in measured if len(sets) > 1]
            out += [f"eval/{last}", *of_each]
    return out


def without_k(key: str) -> str:
    """A key without its number of samples.

    >>> without_k("eval/avg@16"), without_k("eval/avg@16_se")
    ('eval/avg', 'eval/avg@16_se')
    """
    return re.sub(r"@\d+$", "", key)


def value_of(name: str, row: dict[str, Any]) -> float | None:
    """The metric of a name in a row of `metrics.jsonl`, None if it is not there.

    Args:
      name: a key, perhaps without its number of samples, or of several sets without the
        set, for the mean over them.

    >>> row = {"eval/a/avg@8": 0.25, "eval/b/avg@8": 0.75, "tb/loss": 1.0, "lr": 0}
    >>> value_of("eval/avg", row), value_of("eval/b/avg", row), value_of("tb/loss", row)
    (0.5, 0.75, 1.0)
    >>> value_of("entropy", row)
    """
    has_name = lambda key: name in (key, without_k(key))
    if exact := [v for key, v in row.items() if has_name(key)]:
        return exact[0]
    of_sets = [v for key, v in row.items() if has_name(_without_set(key))]
    return sum(of_sets) / len(of_sets) if of_sets else None


def _without_set(key: str) -> str:
    is_of_set = key.startswith("eval/")
    return f"eval/{key.rpartition('/')[2]}" if is_of_set else key
