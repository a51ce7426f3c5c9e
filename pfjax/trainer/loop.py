"""The training loop: what happens before, between and after iterations."""

import collections
import contextlib
import json
import time
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict

from pfjax.infra import compile_cache, distributed, numerics, sharding, storage
from pfjax.model import hf, hub
from pfjax.model.transformer import Policy
from pfjax.tasks import grading
from pfjax.trainer import (
    checkpoint,
    config_checks,
    evaluations,
    export,
    health_checks,
    iteration,
    match,
    metrics,
    preemption,
    run_config,
    tracking,
)
from pfjax.trainer.actor import Cursor
from pfjax.trainer.callbacks import Callbacks, OnEvaluation, OnStep
from pfjax.trainer.lease import Lease
from pfjax.trainer.logging import Writer
from pfjax.trainer.next_steps import next_steps
from pfjax.trainer.profiling import Profiler
from pfjax.trainer.progress import Progress, before_and_after
from pfjax.trainer.setup import NO_FUNCTIONS, Functions, Trainer, setup
from pfjax.trainer.step import TrainState


def train_and_evaluate(
    config: ConfigDict,
    workdir: str,
    on_step: OnStep | None = None,
    on_evaluation: OnEvaluation | None = None,
    functions: Functions = NO_FUNCTIONS,
) -> Policy:
    """Trains a policy toward the alpha-power distribution of its base.

    A run found in `workdir` is continued from its latest checkpoint that is undamaged.

    Args:
      config: see `settings.SETTINGS`.
      workdir: the run's folder, local or `gs://`; the same for all processes.
      on_step, on_evaluation, functions: see `pfjax.fine_tune`.

    Returns:
      The policy after the last step, adapters beside its weights.

    Raises:
      ValueError: for a mistake in the config or its files, or a folder that another run
        is writing to, before training starts.
      FloatingPointError: if the loss or a gradient is not finite.
      health_checks.Unhealthy: if metrics say that the run goes wrong.
      preemption.Preempted: if SIGTERM, SIGINT or SIGHUP ended it, after a save.
      OSError: if a file could not be written.
    """
    config = FrozenConfigDict(config)
    config_checks.check(config, functions.objective)
    tracking.check(config.wandb_project)
    if not workdir:
        raise ValueError("workdir is empty: name a folder for the run")
    folder = storage.place(workdir)
    storage.check_writable(folder)
    checkpoint.check_place(folder)
    mesh = sharding.make_mesh(**config.mesh)
    config = run_config.with_clock(run_config.with_adapter(config), folder)
    run_config.check_workdir(config, folder)
    for name in ("hf", "dial"):  # written at the end
        export.check_places(config, folder / name, folder / "adapter")
    numbers = numerics.as_promised()
    with numbers, jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        trainer, state, about = setup(config, mesh, functions)
        storage.make_folder(folder)
        if distributed.is_first():
            stack.enter_context(Lease(folder))
        callbacks = Callbacks(on_step, on_evaluation)
        run = _Run(config, folder, trainer, callbacks, stack)
        state = run.train(state, about)
        policy, history = trainer.policy(state), run.writer.history
        if policy.config.alpha_range:
            hf.save(policy, folder / "dial", base=config.model)
        export.write(policy, config, history, folder / "hf", folder / "adapter")
        found = run.measure_match(policy)
    if distributed.is_first():
        print(before_and_after(history, folder))
        if found:
            print(match.describe(found, trainer.fns.objective.target.alpha))
        print(next_steps(config, folder))
    return policy


class _Run:
    """The files, processes and signals of a run."""

    def __init__(
        self,
        config: FrozenConfigDict,
        folder: epath.Path,
        trainer: Trainer,
        callbacks: Callbacks,
        stack: contextlib.ExitStack,
    ):
        self.folder, self.trainer, self.callbacks = folder, trainer, callbacks
        self.settings = config
        self.num_steps, self.eval_every = config.num_steps, config.eval_every
        self.checkpoint_every = config.checkpoint_every
        self.has_evaluation = bool(config.data.eval or config.data.target)
        self.best_metric, self.log_every = config.best_metric, config.log_every
        self.health, self.wandb_project = config.health_checks, config.wandb_project
        weights = hub.fingerprint(hub.resolve(config.model))
        self.config = json.loads(config.to_json())
        values = run_config.identity(self.config)
        self.identity = values | {run_config.WEIGHTS: weights} | trainer.inputs
        asked = trainer.inputs.get(run_config.EVAL_PROMPTS, "")
        self.evaluation = evaluations.fingerprint(config, asked)
        best_of = evaluations.best_of(config, self.evaluation)
        self.preempted = stack.enter_context(preemption.Preemption())
        self.checkpoints = stack.enter_context(
            checkpoint.Checkpoints(folder / "checkpoints", config.keep_best, best_of)
        )
        self.grader = stack.enter_context(grading.Grader())
        self.rewards = [trainer.reward, trainer.own_psi]
        for reward in self.rewards:
            stack.enter_context(reward)
        if trainer.rollouts.actor is not None:
            stack.enter_context(trainer.rollouts.actor)
        self.profiler = Profiler(folder / "profile", *config.profile_steps)
        stack.callback(self.profiler.close)

    def train(self, state: TrainState, about: str) -> TrainState:
        """Runs all steps that are left; `state` is donated, `about` said first."""
        state, start, cursor = self._restore(state)
        if distributed.is_first():  # of a run that may be continued
            run_config.write_config(self.settings, self.folder)
        args = (start or -1, self.config, self.wandb_project)
        self.writer = Writer(self.folder, *args)
        self.progress = Progress(start, self.num_steps, self.log_every)
        compilations, closing = compile_cache.Compilations(), contextlib.closing
        with closing(compilations), self.writer, self.progress:
            self.progress.note(about)
            if start:
                self.progress.note(f"continuing {self.folder} after step {start}")
                known = {row["step"] for row in self.writer.history}
                if lost := start - len(known - {0}):
                    self.progress.note(
                        f"warning: metrics.jsonl lacks {lost} of the {start} steps done: it was "
                        "cut, or lost"
                    )
            for change in self.changes:
                self.progress.note(f"warning: {change.format(step=start)}")
            self.grader.check_golds(self.trainer.golds)
            if distributed.is_first():
                for reward in self.rewards:
                    reward.start()
            self._evaluate_at_the_start(state, start)
            for step in range(start + 1, self.num_steps + 1):
                stuck = health_checks.watch(step, self.health.step_seconds)
                with self.profiler.step(step), stuck:
                    state, cursor, values, drawn = iteration.train_iteration(
                        self.trainer, state, cursor, step, self.grader
                    )
                values["time/compile"], made, found = compilations.take()
                if step == start + 1:
                    self.progress.note(
                        f"compiled {made - found} programs, found {found} compiled before"
                    )
                    self._note_reward(values)
                self.progress.update(step, values)
                self.writer.write(step, values)
                self.writer.write_schedule(step, drawn.ids, drawn.rollout)
                self.callbacks.on_step(step, values)
                self._finish_step(state, cursor, step, values)
        self.checkpoints.wait()
        self.preempted.stop_at_once(
            "interrupted after the last step, which is saved; the same command does what is left"
        )
        return state

    def measure_match(self, policy: Policy) -> dict[str, Any]:
        """Estimates the match with the target, if asked for, and writes `match.json`."""
        trainer = self.trainer
        if trainer.measure_match is None:
            return {}
        base = lambda: trainer.at_alpha(trainer.base_policy())
        found = trainer.measure_match(trainer.at_alpha(policy), base, self.grader)
        if distributed.is_first():
            found = {"step": self.num_steps} | found
            text = json.dumps(found, indent=2) + "\n"
            storage.write_text(self.folder / "match.json", text)
        return found

    def _restore(self, state: TrainState) -> tuple[TrainState, int, Cursor]:
        found = self.checkpoints.restore(self.trainer.fns.state, self.identity)
        state, saved = found or (state, {"step": 0, "prompts": 0})
        saved = {"skipped": ()} | saved
        if "replay" in saved:
            self.trainer.rollouts.replay.load(saved["replay"])
        before = saved.get("identity", self.identity)
        is_other = lambda name: before.get(name) != self.identity.get(name)
        self.changes = [x for name, x in run_config.CHANGES.items() if is_other(name)]
        if saved["step"] > self.num_steps:
            raise ValueError(
                f"{self.folder} holds {saved['step']} steps already; "
                f"num_steps={self.num_steps} must not be less"
            )
        return state, saved["step"], Cursor(saved["prompts"], (*saved["skipped"],))

    def _finish_step(
        self, state: TrainState, cursor: Cursor, step: int, values: dict[str, Any]
    ) -> None:
        """Checks health, saves, evaluates, and stops when preempted."""
        wrong = self._symptoms()
        is_preempted, has_failed, is_wrong = self._agree(bool(wrong))
        if is_wrong and self.health.action == "stop":
            reasons = "; ".join(wrong) or "see the log of the first process"
            raise health_checks.Unhealthy(
                f"stopped after step {step}: {reasons}. "
                "--config.health_checks.action=warn continues"
            )
        for symptom in wrong + self._suspicions():
            self.progress.note(f"warning: {symptom}")
        must_stop = is_preempted or has_failed
        may_evaluate = self.has_evaluation and not must_stop
        is_evaluated = may_evaluate and self._is_due(step, self.eval_every)
        is_due = is_evaluated or self._is_due(step, self.checkpoint_every)
        actor = self.trainer.rollouts.actor
        if must_stop and actor is not None and jax.process_count() > 1:
            actor.stop()  # the processes of a save meet on all devices
        if must_stop or is_due:
            self._save(state, cursor, step)
        # After the save: who preempts may not wait for its end, and a run that is continued
        # makes it up.
        if is_evaluated:
            self._evaluate(state, step, values)
            is_preempted, has_failed, _ = self._agree()
        if has_failed:
            self.checkpoints.wait()
            self.callbacks.raise_error(step)
        if is_preempted:
            self.checkpoints.wait()
            raise preemption.Preempted(
                f"interrupted and saved after step {step}; the same command continues"
            )

    def _save(self, state: TrainState, cursor: Cursor, step: int) -> None:
        about = {"step": step, "prompts": cursor.end, "skipped": cursor.skipped}
        about["identity"] = self.identity
        metric = metrics.value_of(self.best_metric, self.writer.history[-1])
        replay = self.trainer.rollouts.replay.arrays()
        self.writer.flush()  # a resumed run finds the rows of the steps before
        self.checkpoints.save(step, state, about, metric, replay)

    def _agree(self, is_wrong: bool = False) -> tuple[bool, bool, bool]:
        """Whether any process was told to stop, has a callback that failed, or `is_wrong`:
        all must do the same then."""
        own = (self.preempted.is_asked, self.callbacks.has_failed, is_wrong)
        return distributed.any_of(own)

    def _is_due(self, step: int, every: int) -> bool:
        return step == self.num_steps or step % every == 0

    def _evaluate_at_the_start(self, state: TrainState, start: int) -> None:
        """Evaluates the base; or does the evaluation that a resumed run missed."""
        rows = {row["step"]: row for row in self.writer.history}
        row = rows.get(start, {"step": start})  # without one, the file was cut or lost
        if self._is_due(start, self.eval_every) and "time/eval" not in row:
            self._evaluate(state, start, row)
        if self._agree()[1]:
            self.callbacks.raise_error(start)

    def _evaluate(self, state: TrainState, step: int, row: dict[str, Any]) -> None:
        """Adds scores to the row of a step, and to its checkpoint."""
        row = row | self._scores(state, step)
        self.writer.write(step, row)
        self.checkpoints.rate(step, metrics.value_of(self.best_metric, row))

    def _scores(self, state: TrainState, step: int) -> dict[str, float]:
        begin = time.perf_counter()
        policy = self.trainer.at_alpha(self.trainer.policy(state))
        values, rows = self.trainer.evaluate(policy, self.grader)
        self.writer.write_completions(step, rows)
        if not values:
            return {}
        shown = collections.defaultdict(list)  # by set, if there are several
        for key, value in values.items():
            if not key.endswith("_se"):
                of_set, _, name = key.rpartition("/")
                shown[of_set].append(f"{name} {value:.3f}")
        for of_set, scores in shown.items():
            self.progress.note("  ".join([f"step {step}  {of_set}".rstrip(), *scores]))
        values = {f"eval/{k}": v for k, v in values.items()}
        self.callbacks.on_evaluation(step, values, rows)
        values[evaluations.FINGERPRINT] = self.evaluation
        return values | {"time/eval": time.perf_counter() - begin}

    def _note_reward(self, values: dict[str, float]) -> None:
        """Says how large the reward is, and how much that is in the target."""
        objective = self.trainer.fns.objective
        # Where it is normalised, beta is in units of its standard deviation. Of a schedule
        # beta is the last.
        is_raw = objective.is_tilted and not objective.kind.reward
        beta, per = objective.beta if is_raw else None, objective.reward_per
        for line in health_checks.reward_scale(values, beta, per == "token"):
            self.progress.note(line)

    def _suspicions(self) -> list[str]:
        health, history = self.health, self.writer.history
        if health.action == "off" or history[-1]["step"] % health.patience:
            return []
        objective = self.trainer.fns.objective
        alpha = objective.target.alpha if objective.has_target else None
        if self.trainer.fns.model.alpha_range:
            alpha = None  # each prompt has its own
        return health_checks.suspicions(history, health.patience, alpha)

    def _symptoms(self) -> list[str]:
        """What is wrong now; with `warn`, once in `patience` steps."""
        health, history = self.health, self.writer.history
        is_quiet = history[-1]["step"] % health.patience > 0
        if health.action == "off" or (health.action == "warn" and is_quiet):
            return []
        limits = (health.length_floor, health.truncated_ceiling, health.rollout_kl)
        has_target = self.trainer.fns.objective.has_target
        return health_checks.symptoms(history, *limits, health.patience, has_target)
