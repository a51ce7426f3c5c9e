r"""Makes a Hugging Face model of a run's checkpoint: pfjax export runs/smoke --best

The latest checkpoint is taken, or with --best the one of the highest `best_metric`, or that
of --step; the run may be finished, stopped, or training. With LoRA a second folder holds
the adapters for peft. --push=me/name sends both to the Hugging Face hub, to a repository
that is private if it is new.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from absl import flags, logging
from etils import epath, epy

from pfjax import cli

with epy.lazy_imports():
    import huggingface_hub
    import jax

    from pfjax.infra import compile_cache, distributed, sharding, storage
    from pfjax.model import dial
    from pfjax.trainer import checkpoint, evaluations, export, history, run_config

FLAGS = flags.FLAGS
flags.DEFINE_integer("step", None, "checkpoint to take; default: the latest")
flags.DEFINE_bool("best", False, "take the checkpoint of the best metric")
flags.DEFINE_string("out", "", "folder; default: hf in the run's, or hf-step-N")
flags.DEFINE_float("alpha", None, "of a run with alpha_range; default: the run's alpha")
flags.DEFINE_string("push", "", "repository on the hub to send the model to")


def main(args: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(args) != 1:
        raise ValueError(f"give one run, a folder that was a --workdir; got {args}")
    distributed.check_alone()
    folder = storage.place(args[0])
    config, step = run_config.read_config(folder), _step(folder)
    if FLAGS.alpha is not None:
        config = _at_alpha(config)
    out, adapter = _places(folder, step)
    export.check_places(config, out, adapter)
    repo = _make_repository(out) if FLAGS.push else ""  # before anything takes long
    compile_cache.use_cache()
    with jax.set_mesh(mesh := sharding.make_mesh()):
        policy = export.load(config, folder, step, mesh)
        rows = history.read(folder / "metrics.jsonl")
        rows = evaluations.comparable(rows)  # with what config.json has
        rows = [row for row in rows if row["step"] <= step]
        export.write(policy, config, rows, out, adapter, repo)
    print(f"model of step {step}: {out}")
    if config.lora.rank:
        print(f"adapters: {adapter}")
    if repo:
        _push(repo, out, adapter if config.lora.rank else None)


def _at_alpha(config: Any) -> Any:
    """The config of a run for every alpha, of which --alpha is exported."""
    ends = dial.parse(config.alpha_range)
    if not ends or not ends[0] <= FLAGS.alpha <= ends[1]:
        known = "has none" if not ends else "is {:g} to {:g}".format(*ends)
        raise ValueError(f"--alpha={FLAGS.alpha:g}: the run's alpha_range {known}")
    return run_config.with_values(config, {"alpha": FLAGS.alpha})


def _step(folder: epath.Path) -> int:
    """The step that is asked for."""
    if FLAGS.best and FLAGS.step is not None:
        raise ValueError("give either --step or --best")
    directory = folder / "checkpoints"
    steps = checkpoint.saved_steps(directory)
    if not steps:
        raise ValueError(f"{folder} has no checkpoint yet")
    if FLAGS.best:
        if (best := checkpoint.best_step(directory)) is None:
            raise ValueError(f"--best: no checkpoint in {folder} has a metric")
        return best
    if FLAGS.step is None:
        return steps[-1]
    if FLAGS.step not in steps:
        raise ValueError(f"--step={FLAGS.step}: {folder} has checkpoints of {steps}")
    return FLAGS.step


def _places(folder: epath.Path, step: int) -> tuple[epath.Path, epath.Path]:
    """Folders of the model and of adapters; without --out none that holds another step."""
    if FLAGS.out:
        out = storage.place(FLAGS.out)
        return out, out.parent / f"{out.name}-adapter"
    is_plain = FLAGS.step is None and not FLAGS.best and not (folder / "hf").exists()
    suffix = "" if is_plain else f"-step-{step}"
    if FLAGS.alpha is not None:
        suffix += f"-alpha-{FLAGS.alpha:g}"
    return folder / f"hf{suffix}", folder / f"adapter{suffix}"


def _make_repository(out: epath.Path) -> str:
    """Its full name."""
    if storage.is_remote(out):
        raise ValueError(
            f"--push sends a folder on this machine, not {out}: give --out"
        )
    with _hub_errors():
        made = huggingface_hub.create_repo(FLAGS.push, private=True, exist_ok=True)
        return made.repo_id


def _push(repo: str, out: epath.Path, adapter: epath.Path | None) -> None:
    """Uploads the model, and adapters into a folder `adapter` beside it."""
    upload = functools.partial(huggingface_hub.upload_folder, repo_id=repo)
    with _hub_errors():
        upload(folder_path=str(out))
        if adapter is not None:
            upload(folder_path=str(adapter), path_in_repo="adapter")
        is_private = huggingface_hub.model_info(repo).private
    seen = "private; its settings there make it public" if is_private else "public"
    print(f"pushed: https://huggingface.co/{repo} ({seen})")


@contextlib.contextmanager
def _hub_errors() -> Iterator[None]:
    """Turns what the hub's client raises, of many kinds, into a ValueError."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        text = f"--push={FLAGS.push}: {reason} (`hf auth login` logs in)"
        raise ValueError(text) from error


if __name__ == "__main__":
    cli.run(main)
