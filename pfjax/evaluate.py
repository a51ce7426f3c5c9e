r"""Scores: python -m pfjax.evaluate --model=runs/math/hf --benchmark=math500,aime24 --out=scores

Sets come from the hub, or from --data=DIR with DIR/math500.jsonl and so on; a set may also
be a file as in training. Each leaves two files in --out: NAME.jsonl, a line a response, and
NAME.json, its scores with every setting that moves them. The same command goes on where it
was stopped; --regrade grades the responses there again, without the model.

Prompts without answers (poem, story and joke: files with a `prompt` per line) have lengths
and distinct responses here; `python -m examples.creative DIR` adds diversity and quality.
"""

import os
import pathlib
import sys

from absl import app, flags, logging

_MODEL = flags.DEFINE_string("model", "pfjax/toy", "Hugging Face folder or hub id")
_BENCHMARK = flags.DEFINE_list(
    "benchmark", None, "sets, comma-separated", required=True
)
_OUT = flags.DEFINE_string("out", None, "folder of scores and responses", required=True)
_DATA = flags.DEFINE_string("data", "", "folder with files of the sets; else the hub")
_SAMPLES = flags.DEFINE_integer("samples", 16, "k of avg@k", lower_bound=1)
_LIMIT = flags.DEFINE_integer("limit", 0, "the first problems of a set only; 0: all")
_STYLE = flags.DEFINE_string(
    "style", "", "how problems are asked: boxed, qwen25-math-cot, power-sampling, minerva, "
    "question, or a text with {question}; default: boxed, and files as they are"
)  # fmt: skip
_NEW = flags.DEFINE_integer("max_new_tokens", 3072, "a response is cut there")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy")
_TOP_K = flags.DEFINE_integer("top_k", 0, "the k likeliest tokens; 0 for all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "the likeliest tokens of this mass")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "tokens this likely, to the likeliest")
_STOP = flags.DEFINE_multi_string(
    "stop", [], "text that ends a response; else the style's"
)
_SEED = flags.DEFINE_integer("seed", 0, "the same seed draws the same")
_BOX = flags.DEFINE_enum("box", "last", ["last", "first"], "which box is the answer")
_REGRADE = flags.DEFINE_bool("regrade", False, "grade again what is in --out")
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
        _evaluate()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def _evaluate() -> None:
    from pfjax.evaluation import results
    from pfjax.tasks import benchmarks, grading

    sets = {}
    for name in _BENCHMARK.value:
        problems = benchmarks.read(name, _DATA.value, _SEED.value)
        sets[name] = problems[: _LIMIT.value or None]
    out = pathlib.Path(_OUT.value).expanduser()
    with grading.Grader() as grader:
        for problems in sets.values():
            benchmarks.check_golds(problems, grader)
        if not _REGRADE.value:
            _sample(sets, out)
        for name, problems in sets.items():
            _score(results.Record(out, name), problems, grader)


def _sample(sets: dict[str, list], out: pathlib.Path) -> None:
    """Draws the responses that the folder lacks."""
    import jax

    from pfjax.evaluation import results, scores
    from pfjax.infra import compile_cache, sharding
    from pfjax.model import hf, tokenizer
    from pfjax.sampler import progress
    from pfjax.tasks import benchmarks

    source = hf.resolve(_MODEL.value)
    tok = tokenizer.load(source)
    compile_cache.use_cache()
    mesh = sharding.make_mesh(tensor=_TENSOR.value)
    on_cpu = jax.devices()[0].platform == "cpu"
    dtype = _DTYPE.value or ("float32" if on_cpu else "bfloat16")
    with jax.set_mesh(mesh):
        policy = hf.load(source, mesh, dtype)
        about_model = {
            "model": _MODEL.value,
            "fingerprint": hf.fingerprint(source),
            "dtype": dtype,
            "mesh": dict(mesh.shape),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        stop_ids = tokenizer.stop_ids(tok, policy.config.stop_ids)
        for name, problems in sets.items():
            style = _style(name)
            prompts = [
                tokenizer.encode_prompt(
                    tok, benchmarks.prompt_of(p, style), is_raw=style.is_raw
                )
                for p in problems
            ]
            settings = _settings(prompts, stop_ids, style)
            files = results.Record(out, name)
            done = files.begin(
                {
                    **about_model,
                    **results.describe(name, problems, style, settings),
                    "first_prompt": tok.decode(prompts[0]),
                }
            )
            k = settings.samples_per_prompt
            before = f", {len(done)} done before" if done else ""
            print(f"{name}: {len(prompts)} prompts x {k}{before}", file=sys.stderr)
            with progress.Progress(len(prompts) * k, len(done) * k) as bar:

                def keep(new: list, files=files, bar=bar) -> None:
                    files.add(new)
                    bar.add(len(new), sum(r["tokens"] for r in new))

                scores.sample(policy, tok, problems, prompts, settings, keep, done=done)
            files.end()


def _style(name: str):
    """How the problems of a set are asked."""
    from pfjax.tasks import benchmarks

    known = benchmarks.BENCHMARKS.get(name)
    chosen = _STYLE.value
    if known is None or known.is_creative:
        chosen = chosen or "question"
    chosen = chosen or "boxed"
    if chosen in benchmarks.STYLES:
        return benchmarks.STYLES[chosen]
    if "{question}" not in chosen:
        raise ValueError(
            f"--style={chosen}: neither one of {', '.join(benchmarks.STYLES)} nor a text "
            "with {question} in it"
        )
    return benchmarks.Style(chosen)


def _settings(prompts, stop_ids, style):
    from pfjax.evaluation import scores
    from pfjax.sampler import filters

    return scores.Settings(
        samples_per_prompt=_SAMPLES.value,
        max_new_tokens=_NEW.value,
        temperature=_TEMPERATURE.value,
        stop_ids=stop_ids,
        seed=_SEED.value,
        prompt_width=max(len(p) for p in prompts),
        truncation=filters.Truncation(
            top_k=_TOP_K.value, top_p=_TOP_P.value, min_p=_MIN_P.value
        ),
        stop_strings=tuple(_STOP.value) or style.stop_strings,
        box=_BOX.value,
    )


def _score(files, problems, grader) -> None:
    """Grades the responses in the folder, and writes and prints their scores."""
    from pfjax.evaluation import scores
    from pfjax.tasks import benchmarks

    rows = files.rows(problems)
    scores.grade(rows, problems, grader, _BOX.value)
    k = len(rows) // len(problems)
    fewer = tuple(2**i for i in range(20) if 2**i < k)
    values = scores.summarise(rows, k, grader, pass_at=fewer, maj_at=fewer)
    about = {"grader": grader.describe() | {"box": _BOX.value}}
    files.score(rows, values, about)
    print(
        f"{files.name}: {len(problems)} problems x {k} ({benchmarks.fingerprint(problems)})"
    )
    for name, value in values.items():
        if not name.endswith("_se"):
            error = values.get(f"{name}_se")
            print(f"  {name:20} {value:9.4f}" + (f" +- {error:.4f}" if error else ""))


if __name__ == "__main__":
    app.run(main)
