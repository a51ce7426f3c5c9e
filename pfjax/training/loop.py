"""Builds everything from a config; the training loop."""

import dataclasses
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from pfjax import packing, sharding
from pfjax.evaluation import benchmarks, grading
from pfjax.policy import hf, model, partition, tokenizer
from pfjax.sampling import engine
from pfjax.training import (
    checkpoint,
    checks,
    data,
    metrics,
    objectives,
    optim,
    rewards,
    step,
)
from pfjax.types import OldScores, PackedBatch, Placement, Rollout


class _Run(NamedTuple):
    """What stays the same during a run."""

    config: ml_collections.FrozenConfigDict
    mesh: Mesh
    tok: Any
    train: data.PromptSet
    eval: data.PromptSet | None
    stop_ids: tuple[int, ...]
    prompt_width: int
    micro_batches: int  # that always suffice for an update
    slots: int
    step_config: step.StepConfig
    base: model.Params  # frozen, in the type of the computation
    train_step: Any  # jitted
    score_step: Any  # jitted


class _Update(NamedTuple):
    """One mini-batch of a step, packed and placed on the mesh."""

    batch: PackedBatch
    placement: Placement
    num_micro: jax.Array
    old: OldScores
    prompt_lengths: np.ndarray
    lengths: np.ndarray


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Trains a policy toward the alpha-power distribution of its base.

    A run found in `workdir` is continued from its latest checkpoint.

    Args:
      config: see `configs/default.py`.
      workdir: the run's folder.

    Raises:
      ValueError: for a mistake in the config or its files, before training starts.
      FloatingPointError: if the loss or a gradient is not finite.
    """
    config = ml_collections.FrozenConfigDict(config)
    checks.check_config(config)
    folder = pathlib.Path(workdir)
    mesh = sharding.make_mesh(**config.mesh)
    checks.check_batch(config, mesh)
    checks.check_workdir(config, folder)
    with jax.set_mesh(mesh):
        run, state = _build(config, mesh)
        folder.mkdir(parents=True, exist_ok=True)
        checks.write_config(config, folder)
        with (
            checkpoint.Checkpoints(folder / "checkpoints") as checkpoints,
            grading.Grader() as grader,
        ):
            _loop(run, state, folder, checkpoints, grader)


def _loop(
    run: _Run,
    state: step.TrainState,
    folder: pathlib.Path,
    checkpoints: checkpoint.Checkpoints,
    grader: grading.Grader,
) -> None:
    config = run.config
    start, cursor = checkpoints.latest_step or 0, 0
    if start > config.num_steps:
        raise ValueError(
            f"{folder} holds {start} steps already; num_steps={config.num_steps} must "
            "not be less"
        )
    if start:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        state, saved = checkpoints.restore(abstract)
        cursor = saved["prompts"]
    writer = metrics.Writer(folder, start or -1, config.wandb_project)
    progress = metrics.Progress(start, config.num_steps, config.log_every)
    progress.note(_describe(run))
    if start:
        progress.note(f"continuing {folder} after step {start}")

    def evaluate(at: int) -> dict[str, float]:
        if run.eval is None:
            return {}
        begin = time.perf_counter()
        scores, rows = _evaluate(run, state, grader)
        metrics.write_jsonl(folder / f"completions/step_{at:06d}.jsonl", rows)
        progress.note(f"step {at}  " + _format_scores(scores))
        scores = {f"eval/{k}": v for k, v in scores.items()}
        return scores | {"time/eval": time.perf_counter() - begin}

    try:
        if start == 0:
            writer.write(0, evaluate(0))
        for number in range(start + 1, config.num_steps + 1):
            is_last = number == config.num_steps
            state, cursor, values = _step(run, state, cursor, number)
            progress.update(number, values)
            if is_last or number % config.eval_every == 0:
                values |= evaluate(number)
            writer.write(number, values)
            if is_last or number % config.checkpoint_every == 0:
                checkpoints.save(number, state, {"prompts": cursor})
    finally:
        progress.close()
        writer.close()
    checkpoints.wait()
    policy = model.Policy(run.step_config.model, state.params["policy"])
    hf.save(policy, folder / "hf", base=config.model)
    print(metrics.before_and_after(writer.history, folder))


def _step(
    run: _Run, state: step.TrainState, cursor: int, number: int
) -> tuple[step.TrainState, int, dict[str, float]]:
    """Prompts -> responses -> packed rows -> updates; returns their metrics."""
    config, clock = run.config, metrics.Clock()
    chosen, ids, cursor = data.next_prompts(
        run.train, cursor, config.prompts_per_step, config.seed
    )
    prompts = [run.train.tokens[i] for i in chosen]
    with jax.named_scope("rollout"):
        rollout = engine.rollout(
            model.Policy(run.step_config.model, state.params["policy"]),
            prompts,
            config.samples_per_prompt,
            config.max_new_tokens,
            config.temperature,
            config.seed,
            step=number,
            prompt_ids=ids,
            stop_ids=run.stop_ids,
            prompt_width=run.prompt_width,
        )
    clock.lap("sample")
    responses = _responses(rollout)
    texts = [tokenizer.decode(run.tok, y.tolist()) for y in responses]
    psi = rewards.format_term(texts, config.psi_unboxed)
    updates = [
        _pack_and_score(run, state, prompts, responses, psi, part)
        for part in np.array_split(
            np.arange(len(responses)), config.updates_per_rollout
        )
    ]
    if number == 1 and config.log_z == "head":
        state = _calibrate(run, state, updates)
    jax.block_until_ready([u.old for u in updates])
    clock.lap("score")
    tables, scalars = [], []
    for update in updates:
        state, values, table = run.train_step(
            state, update.batch, update.old, update.num_micro
        )
        tables.append(table)
        scalars.append(values)
    values = {k: np.mean([float(s[k]) for s in scalars]) for k in scalars[0]}
    clock.lap("update")
    for name in ("loss", "grad_norm"):
        if not np.isfinite(values[name]):
            raise FloatingPointError(
                f"{name} is {values[name]} at step {number}; the last checkpoint is "
                "good. Look at grad_norm and tb/residual_p95_abs of the steps before; "
                "a smaller optim.learning_rate or clip_norm is the usual cure"
            )
    record = _record(updates, tables, rollout)
    scored = [
        row
        for u, t in zip(updates, tables, strict=True)
        for row in packing.unpack_responses(
            t.log_p if u.old.log_p_old is None else u.old.log_p_old,
            u.placement, u.prompt_lengths, u.lengths,
        )
    ]  # fmt: skip
    has_box = np.array([grading.last_boxed(text) is not None for text in texts])
    used = sum(int(u.num_micro) for u in updates) * config.rows * config.row_length
    packed = sum(int((u.batch.segment_ids > 0).sum()) for u in updates)
    times = clock.done()
    out = {
        **metrics.balance_metrics(
            record, (config.importance.low, config.importance.high)
        ),
        **metrics.completion_metrics(record, has_box),
        **metrics.repetition_metrics(responses),
        **metrics.rollout_gap(rollout, scored),
        "grad_norm": values["grad_norm"],
        "log_z_grad_norm": values["log_z_grad_norm"],
        "lr": config.optim.learning_rate
        * min(1.0, float(state.step) / max(config.optim.warmup_steps, 1)),
        "pack/fill": packed / used,
        **times,
        "perf/tokens_per_s": record.length.sum() / times["time/step"],
    }
    return state, cursor, {k: float(v) for k, v in out.items()}


def _responses(rollout: Rollout) -> list[np.ndarray]:
    """The P * G responses as one list, cut to their lengths."""
    rows = rollout.tokens.reshape(-1, rollout.tokens.shape[-1])
    return [y[:n] for y, n in zip(rows, rollout.lengths.reshape(-1), strict=True)]


def _pack_and_score(
    run: _Run,
    state: step.TrainState,
    prompts: list[list[int]],
    responses: list[np.ndarray],
    psi: np.ndarray,
    part: np.ndarray,
) -> _Update:
    """Packs the trajectories `part` of a step and scores them before it updates."""
    config = run.config
    prompt_index = part // config.samples_per_prompt
    prompt_lengths = np.array([len(prompts[q]) for q in prompt_index])
    host, placement, used = packing.pack(
        [
            np.concatenate([prompts[q], responses[i]])
            for i, q in zip(part, prompt_index, strict=True)
        ],
        prompt_lengths,
        rows=config.rows,
        row_length=config.row_length,
        slots=run.slots,
        micro_batches=run.micro_batches,
        psi=psi[part],
        prompt_index=prompt_index.astype(np.int32),
    )
    batch = sharding.put_batch(run.mesh, host, dim=1)
    num_micro = jnp.int32(used)
    log_p_base = run.score_step(run.base, batch, num_micro)
    log_p_old = log_z = None
    if config.log_z == "group" or config.updates_per_rollout > 1:
        log_p_old = run.score_step(state.params["policy"], batch, num_micro)
    if config.log_z == "group":
        residual = _residual_without_log_z(run, batch, log_p_old, log_p_base)
        log_z = objectives.group_log_z(
            residual, batch.prompt_index, config.prompts_per_step
        )
    if config.updates_per_rollout == 1:
        log_p_old = None
    return _Update(
        batch=batch,
        placement=placement,
        num_micro=num_micro,
        old=OldScores(log_p_base, log_p_old, log_z),
        prompt_lengths=prompt_lengths,
        lengths=np.array([len(responses[i]) for i in part]),
    )


def _residual_without_log_z(
    run: _Run, batch: PackedBatch, log_p: jax.Array, log_p_base: jax.Array
) -> jax.Array:
    """Residuals `[M, B, N]` at log Z = 0."""
    sums = jax.vmap(packing.response_log_prob)
    log_pf, zero = sums(log_p, batch), jnp.zeros(batch.length.shape)
    trajectories = objectives.Trajectories(
        log_pf, sums(log_p_base, batch), zero, batch.length, batch.psi, zero + 1.0
    )
    objective = objectives.OBJECTIVES[run.config.objective]
    return objective(trajectories, run.config.alpha)[1]


def _calibrate(
    run: _Run, state: step.TrainState, updates: list[_Update]
) -> step.TrainState:
    """Sets the log Z' head so that the first mean residual is 0."""
    total = count = 0.0
    for u in updates:
        # The policy is still the base: its log-probs are the base's.
        residual = _residual_without_log_z(
            run, u.batch, u.old.log_p_base, u.old.log_p_base
        )
        total += float(jnp.where(u.batch.is_real, residual, 0.0).sum())
        count += float(u.batch.is_real.sum())
    head = partition.calibrated(state.params["log_z"], total / count)
    return state._replace(params={**state.params, "log_z": head})


def _record(
    updates: list[_Update], tables: list[step.StepTable], rollout: Rollout
) -> metrics.StepRecord:
    """The tables of all updates, one entry a trajectory, in the order drawn."""

    def gather(name: str) -> np.ndarray:
        return np.concatenate(
            [
                packing.unpack_slots(getattr(t, name), u.placement)
                for u, t in zip(updates, tables, strict=True)
            ]
        )

    def gather_batch(name: str) -> np.ndarray:
        return np.concatenate(
            [packing.unpack_slots(getattr(u.batch, name), u.placement) for u in updates]
        )

    return metrics.StepRecord(
        prompt_index=gather_batch("prompt_index"),
        length=gather_batch("length"),
        finished=rollout.finished.reshape(-1),
        psi=gather_batch("psi"),
        log_pf=gather("log_pf"),
        log_p_base=gather("log_p_base"),
        log_z=gather("log_z"),
        weight=gather("weight"),
        loss=gather("loss"),
        residual=gather("residual"),
        entropy=gather("entropy"),
    )


def _evaluate(
    run: _Run, state: step.TrainState, grader: grading.Grader
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    config = run.config
    settings = benchmarks.Settings(
        samples_per_prompt=config.eval_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_ids=run.stop_ids,
        seed=config.seed,
        prompts_per_batch=config.prompts_per_step,
        prompt_width=run.prompt_width,
    )
    policy = model.Policy(run.step_config.model, state.params["policy"])
    return benchmarks.evaluate(
        policy,
        run.tok,
        grader,
        run.eval.texts,
        run.eval.tokens,
        run.eval.answers,
        settings,
    )


def _build(
    config: ml_collections.FrozenConfigDict, mesh: Mesh
) -> tuple[_Run, step.TrainState]:
    """Everything a run needs, cheap and fallible things first."""
    source = hf.resolve(config.model)
    model_config = hf.read_config(source)
    tok = tokenizer.load(source)
    limit = config.data.max_prompt_tokens
    train = data.load_prompts(config.data.train, tok, limit)
    held_out = config.data.eval and data.load_prompts(config.data.eval, tok, limit)
    longest = max(len(p) for s in (train, held_out or train) for p in s.tokens)
    max_length = longest + config.max_new_tokens
    checks.check_lengths(config, longest, model_config.max_positions)

    policy = hf.load(source, mesh)
    model_config = dataclasses.replace(policy.config, dtype=config.dtype)
    optimizer = optim.make_optimizer(optim.OptimConfig(**config.optim))
    state, shardings = _init_state(policy.params, model_config, optimizer, config, mesh)
    step_config = step.StepConfig(
        model=model_config,
        objective=config.objective,
        alpha=config.alpha,
        weight_low=config.importance.low,
        weight_high=config.importance.high,
        remat=config.remat,
    )
    everywhere = sharding.replicated(mesh)
    responses = config.prompts_per_step * config.samples_per_prompt
    per_update = -(-responses // config.updates_per_rollout)
    run = _Run(
        config=config,
        mesh=mesh,
        tok=tok,
        train=train,
        eval=held_out or None,
        stop_ids=tokenizer.stop_ids(tok, model_config.stop_ids),
        prompt_width=-(-longest // 16) * 16,
        micro_batches=packing.max_micro_batches(
            per_update, max_length, config.rows, config.row_length
        ),
        slots=packing.slots_per_row(config.row_length, max_length),
        step_config=step_config,
        # A copy, since training gives the buffers of its parameters away.
        base=jax.tree.map(lambda x: jnp.array(x, config.dtype), policy.params),
        train_step=jax.jit(
            functools.partial(step.train_step, config=step_config, optimizer=optimizer),
            donate_argnums=0,
            out_shardings=(shardings, everywhere, everywhere),
        ),
        score_step=jax.jit(
            functools.partial(step.score_step, config=model_config),
            out_shardings=everywhere,
        ),
    )
    return run, state


def _init_state(
    params: model.Params,
    model_config: model.ModelConfig,
    optimizer: optax.GradientTransformation,
    config: ml_collections.FrozenConfigDict,
    mesh: Mesh,
) -> tuple[step.TrainState, step.TrainState]:
    """The state before the first update, and the sharding of each of its parts."""
    everywhere = sharding.replicated(mesh)
    head = partition.init_params(model_config.embed_dim, jax.random.key(config.seed))
    params = {"policy": params, "log_z": jax.device_put(head, everywhere)}
    of_params = jax.tree.map(lambda x: x.sharding, params)
    # Each group's chain holds a MaskedNode in place of the other group.
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    # Left to itself jit would put the moments on one device.
    of_opt = optax.tree.map_params(
        optimizer,
        lambda x, s: x if is_masked(x) else s,
        jax.eval_shape(optimizer.init, params),
        of_params,
        transform_non_params=lambda _: everywhere,
        is_leaf=is_masked,
    )
    opt_state = jax.jit(optimizer.init, out_shardings=of_opt)(params)
    start = jax.device_put(jnp.int32(0), everywhere)
    state = step.TrainState(start, params, opt_state)
    return state, step.TrainState(everywhere, of_params, of_opt)


def _describe(run: _Run) -> str:
    """What follows from the two batch numbers, for the start of the log."""
    c, m = run.config, run.step_config.model
    responses = c.prompts_per_step * c.samples_per_prompt
    parameters = sum(x.size for x in jax.tree.leaves(model.abstract_params(m)))
    sizes = " x ".join(f"{k} {v}" for k, v in run.mesh.shape.items())
    return (
        f"{c.model}: {parameters / 1e6:.2f} M parameters on {run.mesh.size} "
        f"{jax.devices()[0].platform} device(s), mesh {sizes}\n"
        f"{c.objective}, alpha {c.alpha:g}: {c.prompts_per_step} prompts x "
        f"{c.samples_per_prompt} samples = {responses} responses a step, "
        f"{c.updates_per_rollout} update(s) of at most {run.micro_batches} micro-"
        f"batches of {c.rows} x {c.row_length} tokens\n"
        f"{len(run.train.tokens)} training prompts, "
        f"{len(run.eval.tokens) if run.eval else 0} for evaluation"
    )


def _format_scores(scores: dict[str, float]) -> str:
    return "  ".join(f"{k} {v:.3f}" for k, v in scores.items() if not k.endswith("_se"))
