r"""Samples: python -m pfjax.sample --model=pfjax/toy --prompt="17 + 25 = ?"

Prompts come from --prompt (may be repeated) or from --prompts, a file or data set as
in training. Responses go to --out as JSON lines, each as soon as it has ended.

--method=mh and --method=smc draw from the model's power distribution p^alpha without
training it (times e^{-log_z |y|}, which with PowerFlow's log Z' is what it trains toward);
their lines come at the end. --method=low_temperature draws at temperature 1 / alpha, which
sharpens each token on its own.
"""

import contextlib
import json
import os
import sys
import time

import numpy as np
from absl import app, flags, logging

_MODEL = flags.DEFINE_string("model", "pfjax/toy", "Hugging Face folder or hub id")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "a prompt; may be repeated")
_PROMPTS = flags.DEFINE_string("prompts", "", "JSONL or Parquet file, or hub data set")
_SUFFIX = flags.DEFINE_string("suffix", "", "added to each prompt")
_OUT = flags.DEFINE_string("out", "-", "JSONL file to write; - for standard output")
_SAMPLES = flags.DEFINE_integer("samples", 1, "responses a prompt", lower_bound=1)
_NEW = flags.DEFINE_integer(
    "max_new_tokens", None, "of a response; default: 512 or what the model has room for"
)
_TOTAL = flags.DEFINE_integer("max_total_tokens", None, "of all responses together")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy")
_TOP_K = flags.DEFINE_integer("top_k", 0, "the k likeliest tokens; 0 for all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "the likeliest tokens of this mass")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "tokens this likely, to the likeliest")
_STOP = flags.DEFINE_multi_string("stop", [], "text that ends a response")
_SEED = flags.DEFINE_integer("seed", 0, "the same seed draws the same")
_METHOD = flags.DEFINE_enum(
    "method", "tokens", ["tokens", "low_temperature", "mh", "smc"], "see above"
)
_ALPHA = flags.DEFINE_float("alpha", None, "power; for all methods but tokens")
_LOG_Z = flags.DEFINE_float("log_z", 0.0, "nats a token; mh and smc")
_BLOCKS = flags.DEFINE_integer("blocks", 16, "mh: in which responses grow")
_STEPS = flags.DEFINE_integer("steps", 10, "mh: proposals after each block")
_PARTICLES = flags.DEFINE_integer("particles", 64, "smc: of a prompt")
_RAMP = flags.DEFINE_integer("ramp", 100, "smc: tokens over which the power grows")
_SLOTS = flags.DEFINE_integer(
    "slots", None, "decoded at once; what memory holds when not given", lower_bound=1
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float32"], "default: float32 on CPU, else bfloat16"
)
_TENSOR = flags.DEFINE_integer("tensor", 1, "devices that share each matrix")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    # transformers says at import that it has no torch, which nothing here wants.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        _sample()
    except ValueError as error:
        sys.exit(f"error: {error}")


def _sample() -> None:
    import jax

    from pfjax.infra import compile_cache, sharding
    from pfjax.model import hf, tokenizer
    from pfjax.sampler import engine, filters, progress, slots

    if bool(_PROMPT.value) == bool(_PROMPTS.value):
        raise ValueError("give either --prompt or --prompts")
    cut = filters.Truncation(top_k=_TOP_K.value, top_p=_TOP_P.value, min_p=_MIN_P.value)
    temperature = _check_method()
    source = hf.resolve(_MODEL.value)
    tok = tokenizer.load(source)
    texts, prompts = _prompts(tok)
    compile_cache.use_cache()
    mesh = sharding.make_mesh(tensor=_TENSOR.value)
    on_cpu = jax.devices()[0].platform == "cpu"
    dtype = _DTYPE.value or ("float32" if on_cpu else "bfloat16")
    with contextlib.ExitStack() as stack:
        out = sys.stdout
        if _OUT.value != "-":
            out = stack.enter_context(open(_OUT.value, "w", encoding="utf-8"))
        stack.enter_context(jax.set_mesh(mesh))
        policy = hf.load(source, mesh, dtype)
        longest = max(len(p) for p in prompts)
        max_new_tokens = _NEW.value or min(512, policy.config.max_positions - longest)
        stop_ids = tokenizer.stop_ids(tok, policy.config.stop_ids)
        total = len(prompts) * _SAMPLES.value

        def write(finished: list[engine.Finished]) -> None:
            for response in finished:
                row = {
                    "prompt_id": response.prompt,
                    "sample": response.sample,
                    "prompt": texts[response.prompt],
                    "completion": tokenizer.decode(tok, response.tokens.tolist()),
                    "tokens": len(response.tokens),
                    "finished": response.is_stopped,
                    "log_prob": float(response.log_probs.sum(dtype="float64")),
                }
                if _METHOD.value in ("mh", "smc"):  # as --config.data.target takes them
                    row |= {
                        "alpha": _ALPHA.value,
                        "log_z": _LOG_Z.value,
                        "prompt_tokens": prompts[response.prompt],
                        "completion_tokens": response.tokens.tolist(),
                    }
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()

        begin = time.perf_counter()
        if _METHOD.value in ("mh", "smc"):
            print(
                f"{total} responses to {len(prompts)} prompts by {_METHOD.value}",
                file=sys.stderr,
            )
            rollout = _draw_power(policy, prompts, max_new_tokens, stop_ids)
            write(_finished(rollout))
        else:
            plan = slots.make_plan(
                policy,
                num_prompts=len(prompts),
                samples_per_prompt=_SAMPLES.value,
                max_new_tokens=max_new_tokens,
                prompt_width=longest,
                num_slots=_SLOTS.value,
            )
            print(
                f"{total} responses to {len(prompts)} prompts; {plan}", file=sys.stderr
            )
            bar = stack.enter_context(progress.Progress(total))

            def write_and_count(finished: list[engine.Finished]) -> None:
                write(finished)
                bar.add(len(finished), sum(len(r.tokens) for r in finished))

            begin = time.perf_counter()
            rollout = engine.rollout(
                policy,
                prompts,
                _SAMPLES.value,
                max_new_tokens,
                temperature,
                _SEED.value,
                stop_ids=stop_ids,
                num_slots=plan.slots * plan.parts,
                truncation=cut,
                stop_strings=tuple(_STOP.value),
                decode_text=lambda ids: tokenizer.decode(tok, ids),
                max_total_tokens=_TOTAL.value,
                on_finish=write_and_count,
            )
    seconds = time.perf_counter() - begin
    tokens, work = rollout.lengths.sum(), rollout.row_steps
    print(
        f"{tokens} tokens in {seconds:.1f} s, "
        f"{tokens / seconds:.0f} a second, compilation included; "
        f"{1 - tokens / work:.0%} of the slots' steps drew nothing; "
        f"{rollout.finished.mean():.0%} of the responses ended by themselves",
        file=sys.stderr,
    )


# What shapes the distribution in its own way, or cuts a response from outside.
_OF_TOKENS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "stop",
    "max_total_tokens",
    "slots",
)


def _check_method() -> float:
    """The temperature of sampling.

    Raises:
      ValueError: for options that the method does not take.
    """
    method, alpha = _METHOD.value, _ALPHA.value
    if method == "tokens":
        if alpha is not None:
            raise ValueError("--alpha needs --method=low_temperature, mh or smc")
        return _TEMPERATURE.value
    if alpha is None or not alpha > 0:
        raise ValueError(f"--method={method} needs a positive --alpha, got {alpha}")
    names = ("temperature",) if method == "low_temperature" else _OF_TOKENS
    given = [f"--{n}" for n in names if flags.FLAGS[n].present]
    if given:
        raise ValueError(f"--method={method} takes no {', '.join(given)}")
    if method == "smc" and _SAMPLES.value > _PARTICLES.value:
        raise ValueError(
            f"--samples={_SAMPLES.value} are drawn from --particles={_PARTICLES.value}, "
            "which must not be fewer"
        )
    return 1 / alpha


def _draw_power(policy, prompts, max_new_tokens, stop_ids):
    from pfjax.sampler import mcmc, smc

    shared = {
        "alpha": _ALPHA.value,
        "log_z": _LOG_Z.value,
        "seed": _SEED.value,
        "stop_ids": stop_ids,
    }
    args = (policy, prompts, _SAMPLES.value, max_new_tokens)
    if _METHOD.value == "mh":
        return mcmc.metropolis_hastings(
            *args, blocks=_BLOCKS.value, steps=_STEPS.value, **shared
        )
    rollout, log_sum = smc.sequential_monte_carlo(
        *args, particles=_PARTICLES.value, ramp=_RAMP.value, **shared
    )
    print(
        "log of the sum of p^alpha e^(-log_z |y|) over all responses, mean over prompts: "
        f"{log_sum.mean():.3f}",
        file=sys.stderr,
    )
    return rollout


def _finished(rollout) -> list:
    """All responses of a rollout."""
    from pfjax.sampler import engine

    return [
        engine.Finished(
            prompt=q,
            sample=g,
            tokens=rollout.tokens[q, g, : rollout.lengths[q, g]],
            log_probs=rollout.log_probs[q, g, : rollout.lengths[q, g]],
            is_stopped=bool(rollout.finished[q, g]),
        )
        for q, g in np.ndindex(rollout.lengths.shape)
    ]


def _prompts(tok) -> tuple[list[str], list[list[int]]]:
    from pfjax.model import tokenizer
    from pfjax.tasks import benchmarks, data

    if _PROMPTS.value:
        longest = int(1e9)  # the engine refuses what the model has no positions for
        found = data.load_prompts(_PROMPTS.value, tok, longest, _SUFFIX.value)
        return [benchmarks.text_of(p) for p in found.problems], found.tokens
    texts = [text + _SUFFIX.value for text in _PROMPT.value]
    return texts, [tokenizer.encode_prompt(tok, text) for text in texts]


if __name__ == "__main__":
    app.run(main)
