"""The training loop."""

import json
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from pfjax import compilation, folders, packing, processes, sharding
from pfjax.evaluation import benchmarks, grading
from pfjax.policy import hf, lora, model, partition, tokenizer
from pfjax.sampling import engine, truncation
from pfjax.training import (
    build,
    checkpoint,
    checks,
    data,
    guards,
    interruption,
    metrics,
    objectives,
    rewards,
    step,
)
from pfjax.types import OldScores, PackedBatch, Placement, Rollout


class _Update(NamedTuple):
    """One mini-batch of a step, packed and placed on the mesh."""

    batch: PackedBatch
    host: PackedBatch  # the same, where every process has all of it
    placement: Placement
    num_micro: jax.Array
    old: OldScores
    prompt_lengths: np.ndarray
    lengths: np.ndarray


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Trains a policy toward the alpha-power distribution of its base.

    A run found in `workdir` is continued from its latest checkpoint that is undamaged.

    Args:
      config: see `configs/default.py`.
      workdir: the run's folder, local or `gs://`; the same for all processes.

    Raises:
      ValueError: for a mistake in the config or its files, before training starts.
      FloatingPointError: if the loss or a gradient is not finite.
      guards.StoppedByGuard: if metrics say that the run goes wrong.
      interruption.InterruptedRun: if SIGTERM or SIGINT ended it, after a save.
      OSError: if a file could not be written.
    """
    config = ml_collections.FrozenConfigDict(config)
    checks.check_config(config)
    folder = folders.place(workdir)
    mesh = sharding.make_mesh(**config.mesh)
    checks.check_workdir(config, folder)
    with jax.set_mesh(mesh):
        run, state = build.build(config, mesh)
        folder.mkdir(parents=True, exist_ok=True)
        if processes.is_first():
            checks.write_config(config, folder)
        with (
            interruption.Interruption() as told,
            checkpoint.Checkpoints(
                folder / "checkpoints", config.keep_best
            ) as checkpoints,
            grading.Grader() as grader,
        ):
            _loop(run, state, folder, checkpoints, grader, told)


def _loop(
    run: build.Run,
    state: step.TrainState,
    folder: epath.Path,
    checkpoints: checkpoint.Checkpoints,
    grader: grading.Grader,
    told: interruption.Interruption,
) -> None:
    config = run.config
    identity = {
        **checks.what_decides(json.loads(config.to_json())),
        "base": run.fingerprint,
    }
    start, cursor = 0, 0
    found = checkpoints.restore(run.programs.state, identity)
    if found is not None:
        state, saved = found
        start, cursor = saved["step"], saved["prompts"]
    if start > config.num_steps:
        raise ValueError(
            f"{folder} holds {start} steps already; num_steps={config.num_steps} must "
            "not be less"
        )
    writer = metrics.Writer(folder, start or -1, config.wandb_project)
    progress = metrics.Progress(start, config.num_steps, config.log_every)
    progress.note(build.describe(run))
    compilations = compilation.Compilations()
    profiler = metrics.Profiler(folder / "profile", *config.profile_steps)
    if start:
        progress.note(f"continuing {folder} after step {start}")

    def evaluate(at: int) -> dict[str, float]:
        if run.eval is None:
            return {}
        begin = time.perf_counter()
        scores, rows = _evaluate(run, state, grader)
        if processes.is_first():
            metrics.write_jsonl(folder / f"completions/step_{at:06d}.jsonl", rows)
        progress.note(f"step {at}  " + _format_scores(scores))
        scores = {f"eval/{k}": v for k, v in scores.items()}
        return scores | {"time/eval": time.perf_counter() - begin}

    def is_due(number: int, every: int) -> bool:
        return number == config.num_steps or number % every == 0

    def save(number: int) -> None:
        about = {"step": number, "prompts": cursor, "identity": identity}
        metric = metrics.named(writer.history[-1], config.best_metric)
        checkpoints.save(number, state, about, metric)

    try:
        row = writer.history[-1] if start and writer.history else {"step": 0}
        # An interruption comes before the evaluation of its step.
        if is_due(start, config.eval_every) and "time/eval" not in row:
            writer.write(start, row | evaluate(start))
        for number in range(start + 1, config.num_steps + 1):
            with (
                profiler.step(number),
                guards.watch(number, config.guards.step_seconds),
            ):
                state, cursor, values = _step(run, state, cursor, number)
            values["time/compile"], made, found = compilations.take()
            if number == start + 1:
                progress.note(
                    f"compiled {made - found} programs, found {found} compiled before"
                )
            progress.update(number, values)
            writer.write(number, values)
            wrong = _symptoms(writer.history, config.guards)
            # Every process has to know what one of them was told.
            is_told, is_wrong = processes.any_of((told.is_asked, bool(wrong)))
            if is_wrong and config.guards.action == "stop":
                reasons = "; ".join(wrong) or "see the log of the first process"
                raise guards.StoppedByGuard(
                    f"stopped after step {number}: {reasons}. --config.guards.action="
                    "warn goes on"
                )
            for symptom in wrong:
                progress.note(f"warning: {symptom}")
            is_last = number == config.num_steps
            if is_due(number, config.eval_every) and (is_last or not is_told):
                writer.write(number, values | evaluate(number))
                (is_told,) = processes.any_of((told.is_asked,))
            if is_told or is_due(number, config.checkpoint_every):
                save(number)
            if is_told and not is_last:
                checkpoints.wait()
                raise interruption.InterruptedRun(
                    f"interrupted and saved after step {number}; the same command goes on"
                )
    finally:
        progress.close()
        writer.close()
        compilations.close()
        profiler.close()
    checkpoints.wait()
    policy = build.policy_of(run, state)
    if config.lora.rank:
        lora.save_peft(policy, folder / "adapter", config.model)
    card = metrics.model_card(config.to_dict(), writer.history)
    hf.save(lora.merge(policy), folder / "hf", base=config.model, card=card)
    if processes.is_first():
        print(metrics.before_and_after(writer.history, folder))


def _symptoms(
    history: list[dict[str, Any]], config: ml_collections.FrozenConfigDict
) -> list[str]:
    """What is wrong now; with `warn`, once in `patience` steps."""
    if config.action == "off":
        return []
    if config.action == "warn" and history[-1]["step"] % config.patience:
        return []
    return guards.symptoms(
        history, config.length_floor, config.truncated_ceiling, config.patience
    )


def _step(
    run: build.Run, state: step.TrainState, cursor: int, number: int
) -> tuple[step.TrainState, int, dict[str, float]]:
    """Prompts -> responses -> packed rows -> updates; returns their metrics."""
    config, clock = run.config, metrics.Clock()
    chosen, ids, cursor = data.next_prompts(
        run.train, cursor, config.prompts_per_step, config.seed
    )
    prompts = [run.train.tokens[i] for i in chosen]
    with clock.part("rollout"):
        rollout = engine.rollout(
            build.policy_of(run, state),
            prompts,
            config.samples_per_prompt,
            config.max_new_tokens,
            config.temperature,
            config.seed,
            step=number,
            prompt_ids=ids,
            stop_ids=run.stop_ids,
            prompt_width=run.prompt_width,
            num_slots=run.rollout_plan.slots * run.rollout_plan.parts,
        )
    responses = _responses(rollout)
    texts = [tokenizer.decode(run.tok, y.tolist()) for y in responses]
    psi = rewards.format_term(texts, config.psi_unboxed)
    # Split by prompts: the samples of one stay in one update.
    by_prompt = np.arange(len(responses)).reshape(len(prompts), -1)
    parts = [p.ravel() for p in np.array_split(by_prompt, config.updates_per_rollout)]
    with clock.part("base_pass"):
        base = build.base_on_devices(run)
        updates = [
            _pack_and_score(run, state, base, prompts, responses, psi, part, i == 0)
            for i, part in enumerate(parts)
        ]
        if number == 1 and config.log_z == "head":
            state = _calibrate(run, state, updates)
        jax.block_until_ready([u.old for u in updates])
        del base  # with base_memory=host, room for the update
    tables, scalars = [], []
    with clock.part("update"):
        for update in updates:
            state, values, table = run.programs.train_step(
                state, run.frozen, update.batch, update.old, update.num_micro
            )
            tables.append(table)
            scalars.append(values)
        values = {k: float(np.mean([s[k] for s in scalars])) for k in scalars[0]}
    for name in ("loss", "grad_norm"):
        if not np.isfinite(values[name]):
            raise FloatingPointError(
                f"{name} is {values[name]} at step {number}; the last checkpoint is "
                "good. Look at grad_norm and tb/residual_p95_abs of the steps before; "
                "a smaller optim.learning_rate or clip_norm is the usual cure"
            )
    values |= _step_metrics(run, updates, tables, rollout, responses, texts)
    warmed_up = min(1.0, number / max(config.optim.warmup_steps, 1))
    values["lr"] = config.optim.learning_rate * warmed_up
    values |= clock.done()
    values |= metrics.perf_metrics(
        run.programs.step_config.model,
        values,
        np.concatenate([u.prompt_lengths for u in updates]),
        np.concatenate([u.lengths for u in updates]),
    )
    del values["loss"]  # tb/loss
    return state, cursor, values


def _step_metrics(
    run: build.Run,
    updates: list[_Update],
    tables: list[step.StepTable],
    rollout: Rollout,
    responses: list[np.ndarray],
    texts: list[str],
) -> dict[str, float]:
    config = run.config
    record = _record(updates, tables, rollout)
    scored: list[np.ndarray] = []
    for i, (u, table) in enumerate(zip(updates, tables, strict=True)):
        # Of the policy that drew: later updates of a step have moved it.
        log_p = table.log_p if i == 0 else u.old.log_p_old
        scored += packing.unpack_responses(
            log_p, u.placement, u.prompt_lengths, u.lengths
        )
    has_box = np.array([grading.last_boxed(text) is not None for text in texts])
    packed = sum(int((u.host.segment_ids > 0).sum()) for u in updates)
    tokens = run.programs.rows * config.row_length
    computed = sum(int(u.num_micro) for u in updates) * tokens
    clamps = (config.importance.low, config.importance.high)
    out = {
        **metrics.balance_metrics(record, clamps),
        **metrics.completion_metrics(record, has_box),
        **metrics.repetition_metrics(responses),
        **metrics.rollout_metrics(rollout, scored),
        "pack/fill": packed / computed,
    }
    return {k: float(v) for k, v in out.items()}


def _responses(rollout: Rollout) -> list[np.ndarray]:
    """The P * G responses as one list, cut to their lengths."""
    rows = rollout.tokens.reshape(-1, rollout.tokens.shape[-1])
    return [y[:n] for y, n in zip(rows, rollout.lengths.reshape(-1), strict=True)]


def _pack_and_score(
    run: build.Run,
    state: step.TrainState,
    base: model.Params,
    prompts: list[list[int]],
    responses: list[np.ndarray],
    psi: np.ndarray,
    part: np.ndarray,
    is_first: bool,
) -> _Update:
    """Packs the trajectories `part` of a step and scores them before it updates."""
    config, made = run.config, run.programs
    prompt_index = part // config.samples_per_prompt
    prompt_lengths = np.array([len(prompts[q]) for q in prompt_index])
    host, placement, used = packing.pack(
        [
            np.concatenate([prompts[q], responses[i]])
            for i, q in zip(part, prompt_index, strict=True)
        ],
        prompt_lengths,
        rows=made.rows,
        row_length=config.row_length,
        slots=made.row_slots,
        micro_batches=made.micro_batches,
        psi=psi[part],
        prompt_index=prompt_index.astype(np.int32),
    )
    batch = sharding.put_batch(run.mesh, host, dim=1)
    num_micro = jnp.int32(used)
    log_p_base = made.score_step(base, batch, num_micro, config=made.base_config)
    log_p_old = log_z = is_on_policy = None
    # The first update is on policy: it takes its own log-probs for those of before.
    if config.log_z == "group" or not is_first:
        policy = build.policy_of(run, state)
        log_p_old = made.score_step(
            policy.params, batch, num_micro, config=policy.config
        )
    if config.log_z == "group":
        residual = _residual_without_log_z(run, batch, log_p_old, log_p_base)
        log_z = objectives.group_log_z(
            residual, batch.prompt_index, config.prompts_per_step
        )
    if config.updates_per_rollout == 1:
        log_p_old = None
    else:  # one program for all updates
        log_p_old = jnp.zeros_like(log_p_base) if log_p_old is None else log_p_old
        is_on_policy = jnp.full(made.micro_batches, is_first)
    return _Update(
        batch=batch,
        host=host,
        placement=placement,
        num_micro=num_micro,
        old=OldScores(log_p_base, log_p_old, is_on_policy, log_z),
        prompt_lengths=prompt_lengths,
        lengths=np.array([len(responses[i]) for i in part]),
    )


def _residual_without_log_z(
    run: build.Run, batch: PackedBatch, log_p: jax.Array, log_p_base: jax.Array
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
    run: build.Run, state: step.TrainState, updates: list[_Update]
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
            [packing.unpack_slots(getattr(u.host, name), u.placement) for u in updates]
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
    run: build.Run, state: step.TrainState, grader: grading.Grader
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    config = run.config
    settings = benchmarks.Settings(
        samples_per_prompt=config.eval_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.eval_sampling.temperature,
        stop_ids=run.stop_ids,
        seed=config.seed,
        prompt_width=run.prompt_width,
        truncation=truncation.Truncation(
            top_k=config.eval_sampling.top_k,
            top_p=config.eval_sampling.top_p,
            min_p=config.eval_sampling.min_p,
        ),
        stop_strings=tuple(config.eval_sampling.stop_strings),
    )
    policy = build.policy_of(run, state)
    return benchmarks.evaluate(
        policy,
        run.tok,
        grader,
        run.eval.texts,
        run.eval.tokens,
        run.eval.answers,
        settings,
    )


def _format_scores(scores: dict[str, float]) -> str:
    return "  ".join(f"{k} {v:.3f}" for k, v in scores.items() if not k.endswith("_se"))
