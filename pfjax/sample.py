r"""Draws responses: pfjax sample --model=pfjax/toy --prompt="17+25"

Prompts come from --prompt (may be repeated) or from --prompts, a file or data set as
in training. Responses go to --out as JSON lines, each as soon as it has ended.

--method=mh and --method=smc draw from the model's power distribution p^alpha without
training it (times e^{-log_z |y|}, which with PowerFlow's log Z' is what it trains toward,
and e^{beta r} with --reward); their lines come at the end. Below alpha 1 --eta_cutoff leaves
rare tokens out of the flattening, as in training. --method=low_temperature draws at
temperature 1 / alpha, which sharpens each token on its own. --method=best_of draws
--candidates for each response and keeps the likeliest; with --alpha and --log_z the one of
highest alpha log p - log_z |y|.

A policy that was trained for every alpha (runs/x/dial) answers at --alpha.

All devices are used; with --multihost this is one of several processes, the first of which
writes.
"""

import contextlib
import functools
import sys
import time
from typing import Any

from absl import flags, logging
from etils import epy

from pfjax import cli
from pfjax.sampler import options

with epy.lazy_imports():
    from pfjax import targets
    from pfjax.infra import distributed, storage, uploads
    from pfjax.model import hf, lora, tokenizer
    from pfjax.sampler import best_of, engine, mcmc, progress, slots, smc
    from pfjax.tasks import data, problems, samples, target_reward

FLAGS = flags.FLAGS
cli.define_model_flags()
cli.define_sampling_flags()
cli.define_multihost_flag()
flags.DEFINE_integer("samples", 1, "responses per prompt", lower_bound=1)
flags.DEFINE_integer(
    "max_new_tokens", None, "default: 512, or what there is room for", lower_bound=1
)
flags.DEFINE_multi_string("stop", [], "text that ends a response")
flags.DEFINE_multi_string("prompt", [], "a prompt; may be repeated")
flags.DEFINE_string("prompts", "", "file of prompts, or hub data set")
flags.DEFINE_string("prompt_field", "", "column of prompts in it; else found")
flags.DEFINE_string(
    "answer_field", "", "column of answers in it, for --reward; else found"
)
flags.DEFINE_string("suffix", "", "added to each prompt")
flags.DEFINE_string("out", "-", "JSONL file to write; - for standard output")
flags.DEFINE_integer(
    "max_total_tokens", None, "of all responses together", lower_bound=1
)
flags.DEFINE_integer(
    "slots", None, "decoded at once; what memory holds when not given", lower_bound=1
)
flags.DEFINE_enum(
    "method",
    "tokens",
    ["tokens", "low_temperature", "best_of", "mh", "smc"],
    "see above",
)
flags.DEFINE_float(
    "alpha", None, "power; with tokens, at which a policy for every alpha answers"
)
flags.DEFINE_float("log_z", 0.0, "nats per token; mh, smc and best_of")
flags.DEFINE_string(
    "reward", "", "r(y) by name or FILE.py:FUNCTION, as in training; mh and smc"
)
flags.DEFINE_float(
    "beta", 0.0, "nats per response that r(y) is weighed by; mh, smc", lower_bound=0.0
)
flags.DEFINE_float(
    "eta_cutoff",
    0.0,
    "below alpha 1: rare tokens keep the power 1, as in training; mh, smc",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_integer(
    "candidates", 16, "best_of: that each response is the best of", lower_bound=1
)
flags.DEFINE_integer("blocks", 16, "mh: in which responses grow", lower_bound=1)
flags.DEFINE_integer("steps", 10, "mh: proposals after each block", lower_bound=0)
flags.DEFINE_integer("particles", 64, "smc: per prompt", lower_bound=1)
flags.DEFINE_integer(
    "ramp", 100, "smc: tokens over which the power grows", lower_bound=1
)

_OF_TOKENS, _OF_SEQUENCES = ("tokens", "low_temperature", "best_of"), ("mh", "smc")
# Which methods read a flag; all read what is not here.
_READ_BY = {
    "temperature": ("tokens", "best_of"),
    **dict.fromkeys(options.FILTER_NAMES, _OF_TOKENS),
    # They would leave best_of no whole response to rank.
    **dict.fromkeys(("stop", "max_total_tokens"), ("tokens", "low_temperature")),
    "slots": _OF_TOKENS,
    "log_z": ("best_of", *_OF_SEQUENCES),
    "candidates": ("best_of",),
    "blocks": ("mh",),
    "steps": ("mh",),
    "particles": ("smc",),
    "ramp": ("smc",),
    "eta_cutoff": _OF_SEQUENCES,
}


def main() -> None:
    """Draws the responses and writes each as soon as it has ended."""
    logging.set_verbosity(logging.WARNING)
    _check_flags()
    cli.join()
    source, tok = cli.find_model()
    if FLAGS.method == "tokens":
        others = "--method=low_temperature, best_of, mh or smc, or "
        cli.check_alpha(source, FLAGS.alpha is not None, others)
    elif (source / hf.DIAL).is_file():
        raise ValueError(
            f"--method={FLAGS.method} needs an ordinary model, such as the base; "
            f"--model={FLAGS.model} is a policy for every alpha"
        )
    prompts = _prompts(tok)
    if FLAGS.out != "-":
        _check_out()
    with cli.load(source) as policy:
        limit = cli.most_new_tokens(policy.config.max_positions, prompts.tokens, 512)
        if FLAGS.method == "tokens" and FLAGS.alpha is not None:
            policy = lora.at_alpha(policy, FLAGS.alpha)
        # Of --out an old file is kept until here.
        with _output() as add:

            def write(finished: list[engine.Finished], *sample_of: Any) -> None:
                lines = (samples.line(tok, prompts, x, *sample_of) for x in finished)
                add("".join(lines))

            methods = {"best_of": _draw_best, "mh": _draw_power, "smc": _draw_power}
            draw = methods.get(FLAGS.method, _draw_tokens)
            begin = time.perf_counter()
            rollout = draw(policy, tok, prompts, limit, write)
            seconds = time.perf_counter() - begin
            distributed.leave()
    tokens = rollout.lengths.sum()
    _say(
        f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} a second, "
        "compilation included; "
        f"{1 - tokens / rollout.slot_steps:.0%} of the slots' steps are of no response; "
        f"{rollout.finished.mean():.0%} of the responses ended by themselves"
    )


def _output() -> contextlib.AbstractContextManager:
    """What adds text to --out, on the first process."""
    if not distributed.is_first():
        return contextlib.nullcontext(lambda text: None)
    if FLAGS.out == "-":
        return contextlib.nullcontext(functools.partial(print, end="", flush=True))
    return uploads.growing(FLAGS.out)


def _say(text: str) -> None:
    """On standard error, once of all processes."""
    if distributed.is_first():
        print(text, file=sys.stderr)


def _check_flags() -> None:
    """Raises ValueError for what does not go together."""
    if bool(FLAGS.prompt) == bool(FLAGS.prompts):
        raise ValueError("give either --prompt or --prompts")
    cli.check_sampling_flags()
    method, alpha = FLAGS.method, FLAGS.alpha
    if bool(FLAGS.reward) != bool(FLAGS.beta):
        raise ValueError(
            f"--reward={FLAGS.reward} and --beta={FLAGS.beta:g} go together: the weight of "
            "the reward, in nats"
        )
    if FLAGS.reward and method not in _OF_SEQUENCES:
        raise ValueError("--reward needs --method=smc or mh")
    target_reward.check(FLAGS.reward)
    refused = [n for n, methods in _READ_BY.items() if method not in methods]
    if given := [f"--{n}" for n in refused if FLAGS[n].present]:
        raise ValueError(f"--method={method} takes no {', '.join(given)}")
    if method == "best_of":
        _check_best_of()
    if method in ("tokens", "best_of"):
        return
    if alpha is None or not alpha > 0:
        raise ValueError(f"--method={method} needs a positive --alpha, got {alpha}")
    if FLAGS.eta_cutoff and alpha >= 1:
        raise ValueError(
            f"--eta_cutoff={FLAGS.eta_cutoff:g} has no effect at --alpha={alpha:g}: only powers "
            "below 1 raise what is rare; leave it out"
        )
    if method == "smc" and FLAGS.samples > FLAGS.particles:
        raise ValueError(
            f"--samples={FLAGS.samples} are drawn from --particles={FLAGS.particles}, "
            "which must not be fewer"
        )


def _check_out() -> None:
    """Raises ValueError for what cannot be written, or must not be."""
    out = storage.place(FLAGS.out)
    if not storage.is_stream(out):
        storage.check_writable(out.parent)
    if not storage.is_remote(out) and out.is_dir():
        raise ValueError(f"--out={FLAGS.out} is a folder: name a file in it")
    if FLAGS.prompts and storage.is_same(out, storage.place(FLAGS.prompts)):
        raise ValueError(f"--out={FLAGS.out} is the file of --prompts: name another")


def _check_best_of() -> None:
    """Raises ValueError for what ranks nothing, or by one half of a target."""
    alpha, log_z = FLAGS.alpha, FLAGS.log_z
    if (alpha is None) != (log_z == 0) or (alpha is not None and not alpha > 0):
        raise ValueError(
            f"--method=best_of with --alpha={alpha} and --log_z={log_z:g}: leave both out, to "
            "rank by log p, or give both (alpha positive), to rank by alpha log p - log_z |y|"
        )
    if FLAGS.temperature == 0:
        raise ValueError(
            "--method=best_of with --temperature=0: all candidates would be one and the same"
        )


def _draw_best(policy, tok, prompts, max_new_tokens, write):
    """Writes the best of each group of candidates; returns all of them."""
    how = (lambda _: None, FLAGS.candidates)
    drawn = _draw_tokens(policy, tok, prompts, max_new_tokens, *how)
    target = targets.Target(FLAGS.alpha or 1.0, has_format=False)
    kept = best_of.best_of(drawn, FLAGS.candidates, target, FLAGS.log_z)
    write(engine.all_finished(kept))
    count = lambda x: f"{x.lengths.size} responses with {x.lengths.sum()} tokens"
    _say(f"kept {count(kept)} of {count(drawn)}")
    return drawn


def _draw_tokens(policy, tok, prompts, max_new_tokens, write, candidates=1):
    """Samples token by token, so many candidates for each response."""
    num_prompts, num = len(prompts.tokens), FLAGS.samples * candidates
    plan = slots.make_plan(
        policy,
        num_prompts=num_prompts,
        samples_per_prompt=num,
        max_new_tokens=max_new_tokens,
        prompt_width=prompts.longest(),
        num_slots=FLAGS.slots,
    )
    total = num_prompts * num
    _say(f"{total} responses to {num_prompts} prompts; {plan}")
    is_low = FLAGS.method == "low_temperature"
    stop_ids, strings = tokenizer.split_stops(tok, tuple(FLAGS.stop))
    stop = options.StopConditions(
        tokenizer.stop_ids(tok, policy.config) + stop_ids,
        strings,
        functools.partial(tokenizer.decode, tok),
        FLAGS.max_total_tokens,
    )
    with progress.Progress(total) as bar:

        def write_and_count(finished: list[engine.Finished]) -> None:
            write(finished)
            bar.add(len(finished), sum(len(r.tokens) for r in finished))

        return engine.rollout(
            policy,
            prompts.tokens,
            num,
            max_new_tokens,
            1 / FLAGS.alpha if is_low else FLAGS.temperature,
            FLAGS.seed,
            token_filters=cli.token_filters(),
            stop=stop,
            capacity=options.Capacity(num_slots=plan.slots * plan.dp_size),
            on_finish=write_and_count,
        )


def _draw_power(policy, tok, prompts, max_new_tokens, write):
    """Samples the power distribution."""
    num_prompts = len(prompts.tokens)
    what = f"{num_prompts * FLAGS.samples} responses to {num_prompts} prompts"
    target = targets.Target(
        FLAGS.alpha, FLAGS.beta, has_format=False, eta_cutoff=FLAGS.eta_cutoff
    )
    args = (policy, prompts.tokens, target, FLAGS.samples, max_new_tokens)
    stop_ids = tokenizer.stop_ids(tok, policy.config)
    how = {"log_z": FLAGS.log_z, "seed": FLAGS.seed, "stop_ids": stop_ids}
    with target_reward.started(FLAGS.reward, tok, prompts.problems) as reward:
        _say(f"{what} by {FLAGS.method}")
        how["reward"] = reward
        if FLAGS.method == "mh":
            own, found = {"blocks": FLAGS.blocks, "steps": FLAGS.steps}, None
            rollout = mcmc.metropolis_hastings(*args, **how, **own)
        else:
            own = {"particles": FLAGS.particles, "ramp": FLAGS.ramp}
            rollout, found = smc.sequential_monte_carlo(*args, **how, **own)
            tilt = " e^(beta r)" if reward else ""
            rare = " (of rare tokens p)" if FLAGS.eta_cutoff else ""
            what = f"log of the sum of p^alpha{rare} e^(-log_z |y|){tilt} over all responses"
            _say(f"{what}, mean over prompts: {found.log_sum.mean():.3f}")
            _say(smc.describe(rollout, found, **own))
    write(engine.all_finished(rollout), target, FLAGS.log_z, FLAGS.reward, found)
    return rollout


def _prompts(tok: Any) -> data.PromptSet:
    if FLAGS.prompts:
        longest = int(1e9)  # the engine refuses what the model has no positions for
        fields = problems.Fields(FLAGS.prompt_field, FLAGS.answer_field)
        found = data.load_prompts(
            FLAGS.prompts, tok, longest, FLAGS.suffix, fields=fields
        )
        problems.check_fields(fields, found.problems)
        return found
    texts = [text + FLAGS.suffix for text in FLAGS.prompt]
    asked = [problems.Problem(str(i), text, None) for i, text in enumerate(texts)]
    return data.PromptSet(asked, [data.encode(tok, x, "--prompt") for x in texts])


if __name__ == "__main__":
    cli.run(main)
