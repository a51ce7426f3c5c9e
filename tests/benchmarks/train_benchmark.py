"""Times updates: base log-probs, loss, backward pass, AdamW. Prints one JSON line.

    python tests/benchmarks/train_benchmark.py --case=long_tailed --padded
    python tests/benchmarks/train_benchmark.py --model=FOLDER --rollouts=rollouts.npz
    python tests/benchmarks/train_benchmark.py --case=qwen2_5_1_5b   # on a GPU or TPU

An update begins with lists of tokens on the host: packing and transfers are included.
`--rollouts` reads arrays `tokens` [rows, width], `prompt_len` and `response_len`. With
`--padded` the same work is timed too with one trajectory a row, in turn.
"""

import collections
import json
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from configs import default
from pfjax.infra import hardware, sharding
from pfjax.model import attention, flops, hf, transformer
from pfjax.packing import pack, trim_segments
from pfjax.trainer import train_fns
from tests.benchmarks import common


class Case(NamedTuple):
    model: str  # of `random_policy`
    trajectories: int
    prompt_lengths: tuple[int, int]  # uniform between the two
    mean_response: int  # lengths are geometric, cut at the longest
    max_response: int
    microbatch_size: int
    pack_length: int
    dtype: str
    remat: str


CASES = {
    "long_tailed": Case(
        "small", 128, (16, 128), 256, 512, 4, 640, "float32", "attention"
    ),
    "qwen2_5_1_5b": Case(
        "qwen2_5_1_5b", 64, (64, 256), 1000, 3072, 4, 4096, "bfloat16", "full"
    ),
}
_CASE = flags.DEFINE_enum("case", "long_tailed", sorted(CASES), "shapes of the work")
_MODEL = flags.DEFINE_string("model", None, "Hugging Face folder instead of random")
_ROLLOUTS = flags.DEFINE_string("rollouts", None, "npz of trajectories")
_LIMIT = flags.DEFINE_integer("limit", None, "use the first trajectories only")
_ROWS = flags.DEFINE_integer("microbatch_size", None, "rows of a micro-batch")
_LENGTH = flags.DEFINE_integer("pack_length", None, "tokens of a row")
_REMAT = flags.DEFINE_string("remat", None, "what is computed again")
_ATTENTION = flags.DEFINE_string("attention", "auto", "back end")
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed updates")
_PADDED = flags.DEFINE_bool("padded", False, "time one trajectory a row too")
_PROFILE = flags.DEFINE_string("profile", None, "folder for a trace of one update")


def make_trajectories(
    case: Case, vocab_size: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Token ids of prompts and responses together, and lengths of the prompts."""
    rng = np.random.default_rng(0)
    low, high = case.prompt_lengths
    prompts = rng.integers(low, high + 1, size=case.trajectories)
    responses = rng.geometric(1 / case.mean_response, size=case.trajectories)
    lengths = prompts + np.minimum(responses, case.max_response)
    return [
        rng.integers(3, vocab_size, size=n, dtype=np.int32) for n in lengths
    ], prompts


def read_trajectories(path: str) -> tuple[list[np.ndarray], np.ndarray]:
    with np.load(path) as found:
        tokens, prompts = found["tokens"], found["prompt_len"]
        lengths = prompts + found["response_len"]
    return [x[:n] for x, n in zip(tokens, lengths, strict=True)], prompts


def make_update(
    case: Case,
    policy: transformer.Policy,
    sequences: list[np.ndarray],
    prompts: np.ndarray,
    slots: int | None = None,
):
    """What runs an update and returns how many tokens it computed, padding included."""
    longest = max(len(s) for s in sequences)
    config = default.get_config()
    with config.unlocked():
        config.prompts_per_step, config.samples_per_prompt = len(sequences), 1
        config.max_new_tokens = longest - int(prompts.max())
        config.microbatch_size, config.pack_length = (
            case.microbatch_size,
            case.pack_length,
        )
        config.dtype, config.remat = case.dtype, case.remat
        config.attention = _ATTENTION.value
        config.optim.learning_rate = 1e-4
    mesh = jax.sharding.get_mesh()
    config = ml_collections.FrozenConfigDict(config)
    fns = train_fns.train_fns(config, policy.config, int(prompts.max()), mesh)
    base = jax.tree.map(lambda x: jax.numpy.array(x, case.dtype), policy.params)
    params = jax.tree.map(jax.numpy.copy, policy.params)  # given away
    state = train_fns.first_state(fns, params, 0, mesh)
    c = fns.base_model
    is_trimmed = attention.pays_for_segments(c.attention, c.head_dim, c.dtype)

    def update() -> int:
        nonlocal state
        batch, placement, used = pack(
            sequences,
            prompts,
            fns.shape._replace(max_segments=slots or fns.shape.max_segments),
        )
        if is_trimmed:
            batch = trim_segments(batch, placement)
        batch = sharding.put_batch(mesh, batch, dim=1)
        num = jax.numpy.int32(used)
        log_p, _, _ = fns.score_base(base, batch, num)
        batch = batch._replace(log_p_base=log_p)
        state, values, *_ = fns.train_step(state, {}, batch, num)
        if not np.isfinite(float(values["loss"])):
            raise FloatingPointError(f"loss is {values['loss']}")
        return used * fns.shape.microbatch_size * case.pack_length

    return update


def measure(case: Case) -> dict:
    if _MODEL.value:
        policy = hf.load(_MODEL.value, jax.sharding.get_mesh())
    else:
        policy = common.random_policy(case.model, "float32")
    if _ROLLOUTS.value:
        sequences, prompts = read_trajectories(_ROLLOUTS.value)
    else:
        sequences, prompts = make_trajectories(case, policy.config.vocab_size)
    sequences, prompts = sequences[: _LIMIT.value], prompts[: _LIMIT.value]
    lengths = np.array([len(s) for s in sequences])
    updates = {"packed": make_update(case, policy, sequences, prompts)}
    if _PADDED.value:
        alone = case._replace(pack_length=int(lengths.max()))
        updates["padded"] = make_update(alone, policy, sequences, prompts, slots=1)
    first, seconds, computed = {}, collections.defaultdict(list), {}
    for name, update in updates.items():
        begin = time.perf_counter()
        computed[name] = update()
        first[name] = time.perf_counter() - begin
    for _ in range(_REPEATS.value):
        for name, update in updates.items():  # in turn
            begin = time.perf_counter()
            update()
            seconds[name].append(time.perf_counter() - begin)
    if _PROFILE.value:
        with jax.profiler.trace(_PROFILE.value):
            updates["packed"]()
    tokens, typical = int(lengths.sum()), float(np.median(seconds["packed"]))
    work = flops.update_flops(policy.config, lengths, prompts)
    out = {
        "case": _CASE.value,
        "model": pathlib.Path(_MODEL.value).name if _MODEL.value else case.model,
        "vocabulary": policy.config.vocab_size,
        "trajectories": len(sequences),
        "tokens": tokens,
        "microbatch_size": case.microbatch_size,
        "pack_length": case.pack_length,
        "dtype": case.dtype,
        "remat": case.remat,
        "attention": _ATTENTION.value,
        "seconds": common.summary(seconds["packed"]),
        "tokens_per_s": common.summary([tokens / s for s in seconds["packed"]]),
        "fill": tokens / computed["packed"],
        "tflop": work / 1e12,
        "tflop_per_s": work / typical / 1e12,
        "mfu": hardware.mfu(work, typical),
        "compile_s": first["packed"] - typical,
        "peak_memory_mb": common.peak_memory_mb(),
    }
    if _PADDED.value:
        pairs = zip(seconds["padded"], seconds["packed"], strict=True)
        out["padded_seconds"] = common.summary(seconds["padded"])
        out["time_ratio"] = common.summary([a / b for a, b in pairs])
        out["token_ratio"] = computed["padded"] / computed["packed"]
    return out | common.machine()


def main(_) -> None:
    case = CASES[_CASE.value]
    given = {
        "microbatch_size": _ROWS.value,
        "pack_length": _LENGTH.value,
        "remat": _REMAT.value,
    }
    case = case._replace(**{k: v for k, v in given.items() if v is not None})
    with jax.set_mesh(sharding.make_mesh()):
        print(json.dumps(common.rounded(measure(case))), flush=True)


if __name__ == "__main__":
    app.run(main)
