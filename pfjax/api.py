"""What pfjax offers to Python: models that know their tokenizer, text in and text out.

Below this module prompts are token ids and a policy need not have a tokenizer.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from pfjax import packing
from pfjax.batch import PackedBatch, PackShape, Rollout
from pfjax.model import hf, hub, lora, scoring, tokenizer, transformer
from pfjax.model.transformer import Policy
from pfjax.objectives import Objective
from pfjax.sampler import engine

# What a model is asked: text, messages of a chat, or token ids.
Prompt = str | Sequence[dict[str, str]] | Sequence[int] | np.ndarray
# New tokens where nobody says how many, if the model has positions for them.
NEW_TOKENS = 512


def load(
    path_or_hub_id: str | os.PathLike, mesh: Mesh | None = None, dtype: str = "float32"
) -> Policy:
    """Loads a policy from a folder in Hugging Face format, a hub id, a GGUF file, or
    "pfjax/toy".

    Args:
      path_or_hub_id: where; `"pfjax/toy"` ships with pfjax.
      mesh: places the parameters on this mesh, made by `pfjax.infra.sharding.make_mesh`; the
        default device when None.
      dtype: type of the parameters and of the computation.

    Returns:
      The policy, which may be unpacked as `config, params`. Its `tokenizer` is loaded
      when it is first asked for, and None if the folder has none.

    Raises:
      ValueError: if there is no such model, its architecture is not supported, its tensors
        are not exactly those that its config names, or the mesh lacks axes.

    >>> policy = load("pfjax/toy")
    >>> policy.config.num_layers, policy.tokenizer.eos_token
    (3, '<|end|>')
    """
    source = path_or_hub_id
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ValueError(
            f"{source!r} names no model: give a folder, or an id of the hub"
        )
    folder = hub.resolve(source)
    config, params = hf.load(folder, mesh, dtype)
    if tokenizer.is_in(folder):
        read = functools.cache(functools.partial(tokenizer.load, folder))
        config = dataclasses.replace(config, load_tokenizer=read)
    return Policy(config, params)


def rollout(
    policy: Policy,
    prompts: Sequence[Prompt],
    samples_per_prompt: int = 8,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    *,
    alpha: Real | None = None,
    **options: Any,
) -> Rollout:
    """Draws responses to prompts.

    Args:
      policy: the model; under `jax.set_mesh` the prompts are split over all its
        devices but those along "tensor", over which the weights are.
      prompts: P of them, each a text, messages (`[{"role": "user", "content": ...}]`), or
        token ids. A text is encoded as in training: as one message of a user if the
        tokenizer has a chat template.
      samples_per_prompt: G.
      max_new_tokens: R; a response that has not stopped by then is cut. 512, or as many
        as the model has positions for, when None.
      temperature: of sampling; 0 takes the likeliest token. Recorded log-probs are at
        temperature 1 always.
      seed: the same seed draws the same.
      alpha: of a policy trained for every alpha of a range, at which it answers.
      **options: the other arguments of `pfjax.sampler.engine.rollout`: filters of tokens,
        stop conditions, a callback for each response.

    Returns:
      Host arrays `tokens`, `log_probs` `[P, G, R]`, `lengths`, `finished` `[P, G]`; and
      `texts[p][g]`, without special tokens, which is None if the policy has no tokenizer;
      and the token ids of the `prompts`.

    Raises:
      ValueError: for a prompt that is empty or of another kind, text without a tokenizer,
        a negative temperature, a seed that is negative or has more than 32 bits, more
        positions than the model has, or a cache that does not fit in memory.

    >>> import pfjax
    >>> policy = pfjax.load("pfjax/toy")
    >>> how = {"samples_per_prompt": 2, "max_new_tokens": 15, "temperature": 0.0}
    >>> drawn = pfjax.rollout(policy, ["17+25"], **how)
    >>> drawn.tokens.shape, drawn.texts[0][1]
    ((1, 2, 15), '7+5=12,1+2+1=4,')
    """
    policy = transformer.as_policy(policy)
    tok = policy.tokenizer
    if alpha is not None:
        policy = lora.at_alpha(policy, alpha)
    if isinstance(prompts, str | dict) or not isinstance(prompts, Iterable):
        said = f"prompts must be a list: give [{prompts!r}]"
        raise ValueError(said)  # noqa: TRY004
    ids = [_encode(tok, prompt) for prompt in prompts]
    if tok is not None:  # which knows of more tokens that end a response
        stop_ids = tokenizer.stop_ids(tok, policy.config)
        config = dataclasses.replace(policy.config, stop_ids=stop_ids)
        policy = policy._replace(config=config)
    if max_new_tokens is None:
        room = policy.config.max_positions - max(map(len, ids), default=0)
        max_new_tokens = max(1, min(NEW_TOKENS, room))
    args = (policy, ids, samples_per_prompt, max_new_tokens, temperature, seed)
    drawn = engine.rollout(*args, **options)._replace(prompts=ids)
    if tok is None:
        return drawn
    of_prompt = lambda rows, lengths: [
        tokenizer.decode(tok, row[:n].tolist())
        for row, n in zip(rows, lengths, strict=True)
    ]
    texts = [*map(of_prompt, drawn.tokens, drawn.lengths)]
    return drawn._replace(texts=texts)


def _encode(tok: Any, prompt: Any) -> list[int]:
    """Token ids of a prompt of any kind."""
    is_text = isinstance(prompt, str)
    is_list = isinstance(prompt, list | tuple | np.ndarray | jax.Array)
    if not is_text and not is_list:
        raise ValueError(
            f"a prompt must be a text, a list of messages or a list of token ids, got "
            f"{prompt!r}: prompts is a list of these"
        )
    is_messages = is_list and len(prompt) > 0 and isinstance(prompt[0], dict)
    if not is_text and not is_messages:
        ids = np.asarray(prompt)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(
                f"the prompt {prompt!r:.100} is neither a text, nor a list of messages, nor one "
                "of token ids"
            )
        return ids.tolist()
    if tok is None:
        raise ValueError(
            f"the policy has no tokenizer for the prompt {prompt!r}: give token ids, or "
            "pfjax.load a folder with a tokenizer"
        )
    try:
        return tokenizer.encode_prompt(tok, prompt if is_text else list(prompt))
    except Exception as error:  # of jinja, or of what a template does with a value
        said = f"no prompt can be made of {prompt!r:.200}: {error}"
        raise ValueError(said) from error


def pack(
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    shape: tuple[int, int] | None = None,
) -> PackedBatch:
    """Lays sequences end to end in rows, for `log_probs`.

    Args:
      sequences: S of prompt and response together, token ids.
      prompt_lengths: tokens of each sequence that are prompt, at least 1.
      shape: rows and tokens per row `(B, T)`, so that a jitted step compiles once; when
        None, powers of two that suffice.

    Returns:
      A batch of `[B, T]` tokens, with at most N sequences in a row. `prompt_index` `[B, N]`
      holds the number of each, so that `reward[batch.prompt_index]` are values of theirs
      where `is_real`; it is -1 elsewhere.

    Raises:
      ValueError: if a sequence is longer than a row or lacks a prompt or a response, or
        if not all of them fit.

    >>> batch = pack([[2, 10, 3, 4], [2, 3, 4, 5, 6]], [3, 2])
    >>> batch.tokens.shape, batch.length[batch.is_real], batch.prompt_index[0, :3]
    ((1, 64), array([3, 1], dtype=int32), array([ 1,  0, -1], dtype=int32))
    """
    arrays, starts = packing.trajectories(sequences, prompt_lengths)
    if shape is None:
        longest = max(map(len, arrays), default=1)
        pack_length = max(64, _power_of_two(longest))
        segments = packing.segments_per_row(pack_length, pack_length)
        lengths = np.array([*map(len, arrays)], np.int64)
        rows, _, _ = packing.best_fit(lengths, pack_length, segments)
        shape = (_power_of_two(int(rows.max(initial=0)) + 1), pack_length)
    is_pair = np.shape(shape) == (2,) and np.asarray(shape).dtype.kind in "iu"
    if not is_pair or min(shape) < 1:
        said = (
            f"shape must be rows and tokens per row, such as (8, 1024), got {shape!r}"
        )
        raise ValueError(said)
    rows, pack_length = shape
    segments = packing.segments_per_row(pack_length, pack_length)
    whole = PackShape(1, rows, pack_length, segments)
    index = np.arange(len(arrays))
    packed, _, _ = packing.pack(arrays, starts, whole, prompt_index=index)
    return jax.tree.map(lambda x: x[0], packed)


def pack_rollout(rollout: Rollout, shape: tuple[int, int] | None = None) -> PackedBatch:
    """Lays what `pfjax.rollout` has drawn end to end in rows, for `log_probs`.

    Args:
      rollout: G responses to each of P prompts; response g of prompt p has the number
        `p * G + g`.
      shape: as in `pack`.

    Returns:
      As `pack`. `prompt_index // G` is the prompt of each, -1 elsewhere.

    Raises:
      ValueError: as `pack`; and for a rollout without its prompts.

    >>> import pfjax
    >>> drawn = pfjax.rollout(pfjax.load("pfjax/toy"), ["17+25"], 2, 15, temperature=0.0)
    >>> pack_rollout(drawn, (1, 64)).length[0, :3]
    array([15, 15,  0], dtype=int32)
    """
    if rollout.prompts is None:
        raise ValueError(
            "the rollout holds no prompts, as that of pfjax.rollout does: "
            "rollout._replace(prompts=...) adds their token ids"
        )
    sequences, prompt_lengths = [], []
    for p, g in np.ndindex(*rollout.lengths.shape):
        response = rollout.tokens[p, g, : rollout.lengths[p, g]]
        sequences.append([*rollout.prompts[p], *response.tolist()])
        prompt_lengths.append(len(rollout.prompts[p]))
    return pack(sequences, prompt_lengths, shape)


def _power_of_two(n: int) -> int:
    """The least that is no less than n."""
    return 1 << max(n - 1, 0).bit_length()


def log_probs(
    policy: Policy, batch: PackedBatch, *, remat: str = "none"
) -> Float[jax.Array, "b t"]:
    """Log-prob of every response token of a packed batch, for a loss of your own.

    It can be jitted and differentiated: `jax.grad` of a loss of `policy` is a policy of
    gradients, and `optax.apply_updates` adds updates to one. See `examples/own_loss.py`.
    Under your own `jax.pmap`, or `jax.shard_map(check_vma=False)` over all axes, it is of a
    device's part of the batch.

    Args:
      policy: of parameters that gradients flow to; `Policy(config, params)` makes one.
      batch: see `pack`.
      remat: what the backward pass finds stored, a name in `transformer.REMAT`: "none" is
        fastest, "full" takes the least memory.

    Returns:
      Float32 in nats, under the full vocabulary at temperature 1; 0 for tokens that are no
      response. `response_sum` adds them up.

    Raises:
      ValueError: for a token that the model does not have, or a sequence longer than its
        positions, where the batch is known: neither traced nor spread over processes; for
        a batch on a mesh of explicit axes.

    >>> import pfjax
    >>> policy, batch = pfjax.load("pfjax/toy"), pack([[2, 10, 3, 4]], [2])
    >>> loss = lambda policy: -pfjax.response_sum(log_probs(policy, batch), batch).sum()
    >>> jax.grad(loss)(policy).params["final_norm"].shape
    (64,)
    """
    policy = transformer.as_policy(policy)
    packing.check_batch(batch)
    if remat not in transformer.REMAT:
        raise ValueError(
            f"remat={remat!r}: must be one of {', '.join(transformer.REMAT)}"
        )
    if jax.typeof(batch.tokens).sharding.mesh.explicit_axes:
        raise ValueError(
            "the batch is on a mesh of explicit axes: make it by "
            "pfjax.infra.sharding.make_mesh, or jax.make_mesh(axis_types=...Auto)"
        )
    is_known = lambda x: (
        not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
    )
    if is_known(batch.tokens) and is_known(batch.positions):
        transformer.check_tokens(policy.config, [np.asarray(batch.tokens).ravel()])
        last, room = int(np.max(batch.positions)), policy.config.max_positions
        if last >= room:
            raise ValueError(
                f"a sequence has {last + 1} tokens, the model {room} positions"
            )
    if batch.is_response.dtype != bool:  # other trainers have masks of numbers
        batch = batch._replace(is_response=batch.is_response != 0)
    return scoring.packed_log_probs(policy.config, policy.params, batch, remat)[0]


def fine_tune(
    config: ConfigDict,
    workdir: str | os.PathLike,
    on_step: Callable[[int, dict[str, float]], Any] | None = None,
    on_evaluation: Callable[[int, dict[str, float], list[dict]], Any] | None = None,
    reward: Callable[..., list[float]] | None = None,
    format_term: Callable[..., list[float]] | None = None,
    objective: Callable | Objective | None = None,
) -> Policy:
    """Trains as `pfjax train` does, and returns the trained policy.

    A run found in `workdir` is continued. The first SIGINT (an interrupted notebook),
    SIGTERM or SIGHUP stops it after a save; in a thread of your own it hears none.

    Args:
      config: see `recipe`.
      workdir: the run's folder, local or `gs://`; the same for all processes.
      on_step: called after each step with its number and metrics, as in `metrics.jsonl`.
      on_evaluation: called after each evaluation, that of the base at step 0 included, with
        the step, its metrics (`eval/...`), and the graded responses, a dict each, as in
        `completions/`.
      reward: called as those of TRL are, `reward(prompts, completions, completion_ids,
        **columns)`, with the samples of a prompt; returns a number for each. It is what
        `config.beta` weighs in the target, or a policy gradient follows; `config.reward`
        takes its name.
      format_term: called like `reward`; psi of each response, in nats per token, in the
        place of `config.format_penalty`; `config.format_term` takes its name.
      objective: what is trained, an `objectives.Objective`, or a loss
        `loss(y: TrajectoryStats, c: ObjectiveConfig)` of values per trajectory, with the
        target of PowerFlow; `config.objective` takes its name.

    The callbacks and the reward are called on the first process only. An exception in a
    callback stops the run after a save, one in the reward at once; it is raised here, and
    the same call continues.

    Returns:
      The policy after the last step, adapters merged, on the mesh of the run; a folder in
      Hugging Face format is in `workdir/hf`. With `config.alpha_range` the policy for every
      alpha (see `at_alpha`), which is in `workdir/dial`; `workdir/hf` is it at `config.alpha`.

    Raises:
      ValueError: for a mistake in the config or its files, before training starts.
      FloatingPointError: if the loss or a gradient is not finite.
      pfjax.trainer.health_checks.Unhealthy: if metrics say that the run goes wrong.
      pfjax.trainer.preemption.Preempted: if a signal ended it, after a save.

    >>> import pfjax
    >>> pfjax.fine_tune(pfjax.recipe("smoke", alpha=-1.0), "runs/smoke")
    Traceback (most recent call last):
    ValueError: --config.alpha=-1.0: must be positive
    """
    from pfjax.trainer import loop, settings, setup

    functions = setup.Functions(reward, format_term, objective)
    if not isinstance(config, ConfigDict):
        said = f"config must be what pfjax.recipe returns, got {config!r:.100}"
        raise ValueError(said)  # noqa: TRY004
    config = settings.complete(config.copy_and_resolve_references())
    for name, given in functions._asdict().items():
        if given is not None:
            config[name] = _python_name(getattr(given, "loss", given))
    on = (on_step, on_evaluation)
    trained = loop.train_and_evaluate(config, os.fspath(workdir), *on, functions)
    return trained if trained.config.alpha_range else lora.merge(trained)


def _python_name(function: Any) -> str:
    """What a config calls a function that only Python knows."""
    return f"python:{getattr(function, '__qualname__', type(function).__name__)}"
