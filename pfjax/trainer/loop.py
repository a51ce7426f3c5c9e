"""The training loop."""

import json
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from pfjax import objectives
from pfjax.evaluation import elbo, scores
from pfjax.infra import compile_cache, dataset_io, distributed, sharding, storage
from pfjax.model import hf, lora, transformer
from pfjax.sampler import engine, options
from pfjax.tasks import data, grading
from pfjax.trainer import (
    checkpoint,
    health_checks,
    metrics,
    preemption,
    settings,
    setup,
    step,
    updates,
)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Trains a policy toward the alpha-power distribution of its base.

    A run found in `workdir` is continued from its latest checkpoint that is undamaged.

    Args:
      config: see `configs/default.py`.
      workdir: the run's folder, local or `gs://`; the same for all processes.

    Raises:
      ValueError: for a mistake in the config or its files, before training starts.
      FloatingPointError: if the loss or a gradient is not finite.
      health_checks.StoppedByGuard: if metrics say that the run goes wrong.
      preemption.InterruptedRun: if SIGTERM or SIGINT ended it, after a save.
      OSError: if a file could not be written.
    """
    config = ml_collections.FrozenConfigDict(config)
    settings.check_config(config)
    folder = storage.place(workdir)
    mesh = sharding.make_mesh(**config.mesh)
    settings.check_workdir(config, folder)
    with jax.set_mesh(mesh):
        run, state = setup.build(config, mesh)
        folder.mkdir(parents=True, exist_ok=True)
        if distributed.is_first():
            settings.write_config(config, folder)
        with (
            preemption.Interruption() as told,
            checkpoint.Checkpoints(
                folder / "checkpoints", config.keep_best
            ) as checkpoints,
            grading.Grader() as grader,
        ):
            _loop(run, state, folder, checkpoints, grader, told)


def _loop(
    run: setup.Run,
    state: step.TrainState,
    folder: epath.Path,
    checkpoints: checkpoint.Checkpoints,
    grader: grading.Grader,
    told: preemption.Interruption,
) -> None:
    config = run.config
    identity = {
        **settings.what_decides(json.loads(config.to_json())),
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
    progress.note(setup.describe(run))
    compilations = compile_cache.Compilations()
    profiler = metrics.Profiler(folder / "profile", *config.profile_steps)
    if start:
        progress.note(f"continuing {folder} after step {start}")

    def evaluate(at: int) -> dict[str, float]:
        if run.eval is None and run.target is None:
            return {}
        begin, values = time.perf_counter(), {}
        if run.eval is not None:
            values, found = _evaluate(run, state, grader)
            if distributed.is_first():
                dataset_io.write_jsonl(
                    folder / f"completions/step_{at:06d}.jsonl", found
                )
        if run.target is not None:
            values |= elbo.bounds(
                setup.policy_of(run, state),
                transformer.Policy(
                    run.programs.base_config, setup.base_on_devices(run)
                ),
                run.target,
                run.tok,
                alpha=config.alpha,
                psi_unboxed=config.psi_unboxed,
                max_new_tokens=config.max_new_tokens,
                stop_ids=run.stop_ids,
                seed=config.seed,
            )
        progress.note(f"step {at}  " + _format_scores(values))
        values = {f"eval/{k}": v for k, v in values.items()}
        return values | {"time/eval": time.perf_counter() - begin}

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
                health_checks.watch(number, config.guards.step_seconds),
            ):
                state, cursor, values = _step(run, state, cursor, number, grader)
            values["time/compile"], made, found = compilations.take()
            if number == start + 1:
                progress.note(
                    f"compiled {made - found} programs, found {found} compiled before"
                )
            progress.update(number, values)
            writer.write(number, values)
            wrong = _symptoms(writer.history, config.guards)
            # Every process has to know what one of them was told.
            is_told, is_wrong = distributed.any_of((told.is_asked, bool(wrong)))
            if is_wrong and config.guards.action == "stop":
                reasons = "; ".join(wrong) or "see the log of the first process"
                raise health_checks.StoppedByGuard(
                    f"stopped after step {number}: {reasons}. --config.guards.action="
                    "warn goes on"
                )
            for symptom in wrong:
                progress.note(f"warning: {symptom}")
            is_last = number == config.num_steps
            if is_due(number, config.eval_every) and (is_last or not is_told):
                writer.write(number, values | evaluate(number))
                (is_told,) = distributed.any_of((told.is_asked,))
            if is_told or is_due(number, config.checkpoint_every):
                save(number)
            if is_told and not is_last:
                checkpoints.wait()
                raise preemption.InterruptedRun(
                    f"interrupted and saved after step {number}; the same command goes on"
                )
    finally:
        progress.close()
        writer.close()
        compilations.close()
        profiler.close()
    checkpoints.wait()
    policy = setup.policy_of(run, state)
    if config.lora.rank:
        lora.save_peft(policy, folder / "adapter", config.model)
    card = metrics.model_card(config.to_dict(), writer.history)
    hf.save(lora.merge(policy), folder / "hf", base=config.model, card=card)
    if distributed.is_first():
        print(metrics.before_and_after(writer.history, folder))


def _symptoms(
    history: list[dict[str, Any]], config: ml_collections.FrozenConfigDict
) -> list[str]:
    """What is wrong now; with `warn`, once in `patience` steps."""
    if config.action == "off":
        return []
    if config.action == "warn" and history[-1]["step"] % config.patience:
        return []
    return health_checks.symptoms(
        history, config.length_floor, config.truncated_ceiling, config.patience
    )


def _step(
    run: setup.Run,
    state: step.TrainState,
    cursor: int,
    number: int,
    grader: grading.Grader,
) -> tuple[step.TrainState, int, dict[str, float]]:
    """Does step `number`.

    Returns:
      The new state, the new data cursor, and the step's metrics.

    Raises:
      FloatingPointError: if the loss or a gradient is not finite.
    """
    config, clock = run.config, metrics.Clock()
    chosen, ids, cursor = data.next_prompts(
        run.train, cursor, config.prompts_per_step, config.seed
    )
    with clock.part("rollout"):
        rollout = engine.rollout(
            setup.policy_of(run, state),
            [run.train.tokens[i] for i in chosen],
            config.samples_per_prompt,
            config.max_new_tokens,
            config.temperature,
            config.seed,
            step=number,
            prompt_ids=ids,
            stop=options.StopConditions(run.stop_ids),
            capacity=options.Capacity(
                prompt_width=run.prompt_width,
                num_slots=run.rollout_plan.slots * run.rollout_plan.dp_size,
            ),
        )
    with clock.part("reward"):
        drawn = updates.judge(run, chosen, rollout, grader)
    # Split by prompts: the samples of one stay in one update.
    by_prompt = np.arange(len(drawn.responses)).reshape(len(chosen), -1)
    parts = [p.ravel() for p in np.array_split(by_prompt, config.updates_per_rollout)]
    with clock.part("base_pass"):
        base = setup.base_on_devices(run)
        batches = [
            updates.pack_and_score(run, state, base, drawn, part, is_first=i == 0)
            for i, part in enumerate(parts)
        ]
        source = objectives.log_z_of(config.objective, config.log_z)
        if number == 1 and source == "head":
            state = updates.calibrate(run, state, batches)
        jax.block_until_ready([u.old for u in batches])
        del base  # with base_memory=host, room for the update
    tables, scalars = [], []
    with clock.part("update"):
        for update in batches:
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
    values |= updates.step_metrics(run, batches, tables, drawn)
    warmed_up = min(1.0, number / max(config.optim.warmup_steps, 1))
    values["lr"] = config.optim.learning_rate * warmed_up
    values |= clock.done()
    values |= metrics.perf_metrics(
        run.programs.step_config.model,
        values,
        np.concatenate([u.prompt_lengths for u in batches]),
        np.concatenate([u.lengths for u in batches]),
    )
    del values["loss"]  # tb/loss
    return state, cursor, values


def _evaluate(
    run: setup.Run, state: step.TrainState, grader: grading.Grader
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    config = run.config
    settings = scores.Settings(
        samples_per_prompt=config.eval_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.eval_sampling.temperature,
        stop_ids=run.stop_ids,
        seed=config.seed,
        prompt_width=run.prompt_width,
        token_filters=options.token_filters(config.eval_sampling),
        stop_strings=tuple(config.eval_sampling.stop_strings),
    )
    policy, held_out = setup.policy_of(run, state), run.eval
    return scores.evaluate(
        policy, run.tok, grader, held_out.problems, held_out.tokens, settings
    )


def _format_scores(scores: dict[str, float]) -> str:
    return "  ".join(f"{k} {v:.3f}" for k, v in scores.items() if not k.endswith("_se"))
