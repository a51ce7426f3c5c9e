r"""Measures rollouts; prints one JSON line. Runs on CPU, GPU and TPU.

    python tests/benchmarks/rollout_benchmark.py --case=long_tailed --simple
    python tests/benchmarks/rollout_benchmark.py --case=qwen2_5_1_5b    # on a GPU or TPU
    python tests/benchmarks/rollout_benchmark.py --case=custom --model=FOLDER ...

With --simple the reference sampler of the tests runs in turn with ours, and the ratio
of each pair is what counts: machines drift.
"""

import collections
import json
import pathlib
import sys
import time

import jax
import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from pfjax.batch import Rollout
from pfjax.model import hf, scoring, transformer
from pfjax.model.config import ModelConfig
from pfjax.sampler import decode, engine, options, slots
from tests.benchmarks import common
from tests.sampler import simple_sampler

Case = collections.namedtuple(
    "Case", "model dtype prompts samples prompt_lengths max_new_tokens slots stops"
)
CASES = {
    "long_tailed": Case("small", "float32", 16, 8, (16, 128), 512, 64, True),
    "equal": Case("small", "float32", 16, 8, (64, 64), 256, None, False),
    "long_prompts": Case("small", "float32", 4, 16, (2048, 2048), 128, None, False),
    "qwen2_5_1_5b": Case(
        "qwen2_5_1_5b", "bfloat16", 32, 8, (128, 512), 1024, 256, False
    ),
    "custom": Case("small", "float32", 16, 8, (16, 128), 512, None, True),
}

_CASE = flags.DEFINE_enum("case", "long_tailed", list(CASES), "what to measure")
_MODEL = flags.DEFINE_string("model", "", "Hugging Face folder; random when not given")
_PROMPTS = flags.DEFINE_integer("prompts", None, "P")
_SAMPLES = flags.DEFINE_integer("samples", None, "G")
_LENGTHS = flags.DEFINE_list("prompt_lengths", None, "shortest,longest")
_NEW = flags.DEFINE_integer("max_new_tokens", None, "of a response")
_SLOTS = flags.DEFINE_integer("slots", None, "samples decoded at once")
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed rollouts")
_SEED = flags.DEFINE_integer("seed", 0, "of prompts and draws")
_SIMPLE = flags.DEFINE_bool("simple", False, "time the reference sampler too")
_SCORE = flags.DEFINE_bool("score", False, "compare log-probs with pfjax.score")


def make_prompts(case: Case, vocab_size: int, seed: int) -> list[list[int]]:
    """Lengths uniform between the two given, both of which occur."""
    low, high = case.prompt_lengths
    rng = np.random.default_rng(seed)
    lengths = rng.integers(low, high + 1, size=case.prompts)
    lengths[0], lengths[1] = high, low
    return [rng.integers(3, vocab_size, size=n).tolist() for n in lengths]


def bytes_a_token(
    run, plan: slots.Plan, config: ModelConfig, prompts: list[list[int]]
) -> tuple[float, float]:
    """Bytes that decoding reads from memory a token, and the least possible.

    Each step reads the weights once and the caches: all of their width in the plain
    form; in a kernel what is filled, rounded up to blocks (half of one on average).
    The least is the weights, the filled part of each slot's cache, and each prompt
    once for all of its samples. Of models whose layers have no windows.
    """
    steps: collections.Counter = collections.Counter()
    original = decode.decode

    def counted(draw, prompts, queue, of_slots, cache, results, **kwargs):
        size, width = len(of_slots.sample), cache[0][1].shape[2]
        before = int(np.sum(of_slots.slot_steps))
        out = original(draw, prompts, queue, of_slots, cache, results, **kwargs)
        num = (int(np.sum(out[0].slot_steps)) - before) // size
        steps[size, width, len(prompts.length)] += num
        return out

    decode.decode = counted
    try:
        rollout: Rollout = run()
    finally:
        decode.decode = original
    shapes = transformer.abstract_params(config)
    if not config.tied_embeddings:
        del shapes["embed"]  # a row a token is read
    size = np.dtype(config.dtype).itemsize
    weights = size * sum(x.size for x in jax.tree.leaves(shapes))
    kv = config.num_layers * slots.bytes_per_token(config, plan.cache_dtype)
    drawn = rollout.lengths.astype(np.float64)
    lengths = np.array([len(p) for p in prompts])
    filled = (drawn * (drawn + 1) / 2).sum() + (drawn.max(axis=1) * lengths).sum()
    read = filled + 64 * drawn.sum()
    if plan.backend == "xla":
        read = sum(
            num * (size * width + prefix_slots * plan.prompt_width)
            for (size, width, prefix_slots), num in steps.items()
        )
    weights *= sum(steps.values())
    return (weights + read * kv) / drawn.sum(), (weights + filled * kv) / drawn.sum()


def bandwidth() -> float:
    """Bytes a second that this device moves when it adds 1 to a large array."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(step(jax.numpy.zeros(1 << 28, "float32")))
    best, num = np.inf, 10  # in flight together: launching is not measured
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(num):
            x = step(x)
        jax.block_until_ready(x)
        best = min(best, (time.perf_counter() - begin) / num)
    return 2 * x.nbytes / best


def measure(case: Case) -> dict:
    if _MODEL.value:
        policy = hf.load(_MODEL.value)
    else:
        policy = common.random_policy(case.model, case.dtype)
    config = policy.config
    prompts = make_prompts(case, config.vocab_size, _SEED.value)
    kwargs = {
        "samples_per_prompt": case.samples,
        "max_new_tokens": case.max_new_tokens,
    }
    # Past the vocabulary: nothing stops.
    stop_ids = config.stop_ids if case.stops else (config.vocab_size,)
    plan = slots.make_plan(
        policy,
        num_prompts=case.prompts,
        samples_per_prompt=case.samples,
        max_new_tokens=case.max_new_tokens,
        prompt_width=max(map(len, prompts)),
        num_slots=case.slots,
    )

    def ours(seed):
        return engine.rollout(
            policy,
            prompts,
            seed=seed,
            stop=options.StopConditions(stop_ids=stop_ids),
            capacity=options.Capacity(num_slots=plan.slots),
            **kwargs,
        )

    def simple(seed):
        return simple_sampler.rollout(
            policy, prompts, seed=seed, stop_ids=stop_ids, **kwargs
        )

    samplers = {"ours": ours} | ({"simple": simple} if _SIMPLE.value else {})
    first, rates, waste = {}, collections.defaultdict(list), []
    for name, sampler in samplers.items():
        begin = time.perf_counter()
        sampler(_SEED.value)
        first[name] = time.perf_counter() - begin
    seeds = range(_SEED.value, _SEED.value + _REPEATS.value)
    for seed in seeds:  # other lengths may need programs of other shapes
        ours(seed)
    for seed in seeds:
        for name, sampler in samplers.items():  # in turn
            begin = time.perf_counter()
            rollout = sampler(seed)
            seconds = time.perf_counter() - begin
            tokens = int(rollout.lengths.sum())
            rates[name].append(tokens / seconds)
            if name == "ours":
                waste.append(1 - tokens / rollout.slot_steps)
                steady = seconds
    moved, least = bytes_a_token(lambda: ours(_SEED.value), plan, config, prompts)
    copied = bandwidth()
    out = {
        "case": _CASE.value,
        **case._asdict(),
        "model": pathlib.Path(_MODEL.value).name or case.model,
        "slots": plan.slots,
        "backend": plan.backend,
        "cache_dtype": plan.cache_dtype,
        "cache_mb": plan.cache_bytes / 1e6,
        "tokens_per_s": common.summary(rates["ours"]),
        "compile_s": first["ours"] - steady,
        "waste": common.summary(waste),
        "peak_memory_mb": common.peak_memory_mb(),
        "kb_per_token": moved / 1e3,
        "least_kb_per_token": least / 1e3,
        "bandwidth_gb_s": copied / 1e9,
        "share_of_bandwidth": float(np.median(rates["ours"])) * least / copied,
    }
    if _SIMPLE.value:
        pairs = zip(rates["ours"], rates["simple"], strict=True)
        out["simple_tokens_per_s"] = common.summary(rates["simple"])
        out["ratio"] = common.summary([a / b for a, b in pairs])
    if _SCORE.value:
        out["logp_gap_max"] = logp_gap(policy, prompts, ours(_SEED.value))
    return out | common.machine()


def logp_gap(policy: transformer.Policy, prompts: list[list[int]], r: Rollout) -> float:
    """Largest distance of a recorded log-prob from the scorer's."""
    at = list(np.ndindex(*r.lengths.shape))
    scored = scoring.score(
        policy,
        [prompts[p] + r.tokens[p, g, : r.lengths[p, g]].tolist() for p, g in at],
        [len(prompts[p]) for p, _ in at],
    )
    gaps = [
        np.abs(r.log_probs[p, g, : r.lengths[p, g]] - x).max()
        for (p, g), x in zip(at, scored, strict=True)
    ]
    return float(max(gaps))


def main(_) -> None:
    case = CASES[_CASE.value]
    given = {
        "prompts": _PROMPTS.value,
        "samples": _SAMPLES.value,
        "prompt_lengths": _LENGTHS.value and tuple(int(x) for x in _LENGTHS.value),
        "max_new_tokens": _NEW.value,
        "slots": _SLOTS.value,
    }
    case = case._replace(**{k: v for k, v in given.items() if v is not None})
    print(json.dumps(common.rounded(measure(case))), flush=True)


if __name__ == "__main__":
    app.run(main)
