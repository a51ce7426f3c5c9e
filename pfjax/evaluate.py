r"""Scores a model: pfjax evaluate --model=runs/math/hf --benchmark=math500,aime24 --out=scores

Sets come from the hub, or from --data=DIR with DIR/math500.jsonl and so on; a set may also
be a file as in training. Each leaves two files in --out: NAME.jsonl, one line per response, and
NAME.json, its scores with every setting that moves them. The same command goes on where it
was stopped; --regrade grades the responses there again, without the model. All devices are
used; with --multihost this is one of several processes, the first of which writes.

Of a policy for every alpha, --model=runs/x/dial --alpha=0.5,1,2,4 scores each.

Prompts without answers (poem, story and joke: files with a `prompt` per line) have lengths
and distinct responses here; `python -m examples.creative DIR` adds diversity and quality.
"""

import contextlib
import pathlib
import sys
from typing import Any

from absl import flags, logging
from etils import epath, epy

from pfjax import cli

with epy.lazy_imports():
    import jax
    import numpy as np

    from pfjax.evaluation import results, scores
    from pfjax.infra import distributed, storage
    from pfjax.model import hub, lora, tokenizer, transformer
    from pfjax.sampler import progress
    from pfjax.tasks import benchmarks, data, grading

FLAGS = flags.FLAGS
cli.define_model_flags()
cli.define_sampling_flags()
cli.define_multihost_flag()
flags.DEFINE_integer("samples", 16, "k of avg@k", lower_bound=1)
flags.DEFINE_integer(
    "max_new_tokens", None, "default: 3072, or what there is room for", lower_bound=1
)
flags.DEFINE_multi_string("stop", [], "text that ends a response; else the style's")
flags.DEFINE_list("benchmark", None, "sets, comma-separated", required=True)
flags.DEFINE_string("out", None, "folder of scores and responses", required=True)
flags.DEFINE_list(
    "alpha", [], "at which a policy for every alpha answers; a folder of --out for each"
)
flags.DEFINE_string("data", "", "folder with files of the sets; else the hub")
flags.DEFINE_string("prompt_field", "", "column of prompts in files; else found")
flags.DEFINE_string("answer_field", "", "column of answers in files; else found")
flags.DEFINE_integer(
    "limit", 0, "the first problems of a set only; 0: all", lower_bound=0
)
flags.DEFINE_string(
    "style", "", "how problems are asked: boxed, qwen25-math-cot, power-sampling, minerva, "
    "question, or a text with {question}; default: boxed, and files as they are"
)  # fmt: skip
flags.DEFINE_enum("box", "last", ["last", "first"], "which box is the answer")
flags.DEFINE_bool("regrade", False, "grade again what is in --out")


def main() -> None:
    logging.set_verbosity(logging.WARNING)
    cli.check_sampling_flags()
    cli.join()
    sets = {}
    fields = benchmarks.Fields(FLAGS.prompt_field, FLAGS.answer_field)
    for name in FLAGS.benchmark:
        problems = benchmarks.read(name, FLAGS.data, FLAGS.seed, fields)
        sets[name] = problems[: FLAGS.limit or None]
    folders = _folders()
    if len({pathlib.PurePath(name).stem for name in sets}) < len(FLAGS.benchmark):
        raise ValueError(
            f"--benchmark={','.join(FLAGS.benchmark)}: two sets of one name would share "
            f"files in {FLAGS.out}; give each an --out of its own"
        )
    storage.check_writable(storage.place(FLAGS.out))
    is_first = distributed.is_first()  # which alone reads and writes --out, and grades
    with grading.Grader() as grader:
        for problems in sets.values():
            grader.check_golds([p.gold for p in problems])
        if not FLAGS.regrade:
            _sample(sets, folders)
        distributed.leave()
        for alpha, out in folders.items() if is_first else ():
            at = "" if alpha is None else f", alpha {alpha:g}"
            for name, problems in sets.items():
                _score(results.Record(out, name), name + at, problems, grader)


def _folders() -> dict[float | None, epath.Path]:
    """Where the files of each --alpha go; of None without."""
    out = storage.place(FLAGS.out)
    try:
        alphas = [float(x) for x in FLAGS.alpha]
    except ValueError:
        said = f"--alpha={','.join(FLAGS.alpha)}: must be numbers with commas between"
        raise ValueError(said) from None
    return {x: out / f"alpha-{x:g}" for x in alphas} or {None: out}


def _score(
    files: "results.Record", name: str, problems: list, grader: "grading.Grader"
) -> None:
    """Grades the responses to a set, and prints the scores."""
    rows = files.rows(problems)
    scores.grade(rows, problems, grader, FLAGS.box)
    k = len(rows) // len(problems)
    fewer = tuple(2**i for i in range(20) if 2**i < k)
    values = scores.summarise(rows, k, grader, fewer)
    about = {"grader": grader.describe() | {"box": FLAGS.box}}
    files.score(rows, {"graded": about, "scores": values})
    version = benchmarks.version_of(problems)
    found = benchmarks.recognise(problems) or "a set of no name here"
    print(f"{name}: {len(problems)} problems x {k} ({version}, {found})")
    if missing := [p.gold for p in problems].count(None):
        print(
            f"  {missing} of {len(problems)} problems have no answer: they count "
            "in lengths and distinct responses alone"
        )
    for key, value in values.items():
        if not key.endswith("_se"):
            error = values.get(f"{key}_se")
            error = f" +- {error:.4f}" if error else ""
            print(f"  {key:20} {value:9.4f}{error}")


def _sample(sets: dict[str, list], folders: dict[float | None, epath.Path]) -> None:
    """Draws the responses that the folders lack."""
    before = (results.clock_of(out, sets) for out in folders.values())
    clock = FLAGS.clock or next(filter(None, before), "") or tokenizer.now()
    FLAGS.clock = distributed.text_from_first(clock)
    source, tok = cli.find_model()
    cli.check_alpha(source, bool(FLAGS.alpha))
    with cli.load(source) as policy:
        about_model = {
            "model": FLAGS.model,
            "fingerprint": hub.fingerprint(source),
            "dtype": policy.config.dtype,
            "mesh": dict(jax.sharding.get_abstract_mesh().shape),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        if FLAGS.chat_template_kwargs:
            about_model["chat_template_kwargs"] = FLAGS.chat_template_kwargs
        if tokenizer.asks_for_time(source):
            about_model["clock"] = FLAGS.clock
        for alpha, out in folders.items():
            about, at_alpha = about_model, policy
            if alpha is not None:
                about = about_model | {"alpha": alpha}
                at_alpha = lora.at_alpha(policy, alpha)
            for name, problems in sets.items():
                _sample_set(at_alpha, tok, problems, results.Record(out, name), about)


def _sample_set(
    policy: "transformer.Policy",
    tok: Any,
    problems: list,
    files: "results.Record",
    about_model: dict[str, Any],
) -> None:
    """Draws the responses to a set that its files lack."""
    name, k = files.name, FLAGS.samples
    style = benchmarks.style_of(name, FLAGS.style)
    prompts = [
        data.encode(
            tok,
            benchmarks.prompt_of(problem, style),
            f"{name}, problem {problem.id}",
            policy.config,
            is_raw=style.is_raw,
        )
        for problem in problems
    ]
    settings = scores.Settings(
        samples_per_prompt=k,
        max_new_tokens=cli.most_new_tokens(policy.config.max_positions, prompts, 3072),
        temperature=FLAGS.temperature,
        stop_ids=tokenizer.stop_ids(tok, policy.config),
        seed=FLAGS.seed,
        prompt_width=max(map(len, prompts)),
        token_filters=cli.token_filters(),
        stop_strings=tuple(FLAGS.stop) or style.stop_strings,
    )
    about = results.describe(name, problems, style, settings, tok, prompts)
    is_done = np.zeros(len(prompts), bool)
    if is_first := distributed.is_first():
        is_done[list(files.begin(about_model | about))] = True
    done = frozenset(np.flatnonzero(distributed.from_first(is_done)).tolist())
    before = f", {len(done)} done before" if done else ""
    if is_first:
        print(f"{name}: {len(prompts)} prompts x {k}{before}", file=sys.stderr)
    adding = files.adding() if is_first else contextlib.nullcontext(lambda new: None)
    with adding as add, progress.Progress(len(prompts) * k, len(done) * k) as bar:

        def keep(new: list) -> None:
            add(new)
            bar.add(len(new), sum(r["tokens"] for r in new))

        scores.sample(policy, tok, problems, prompts, settings, keep, done=done)


if __name__ == "__main__":
    cli.run(main)
