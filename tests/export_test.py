"""pfjax export, as a person runs it: on one device, of runs that eight trained."""

import json
import re
import shutil
import types

import huggingface_hub
import jax
import pytest
from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict

from pfjax.trainer import checkpoint, loop, model_card, run_config
from tests.conftest import run_command
from tests.trainer import loop_test


@pytest.fixture(scope="module")
def _run_folder(_enumerable_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    c = loop_test.small_config(_enumerable_folder, folder)
    c.data.eval, c.eval_every, c.eval_samples = c.data.train, 2, 2
    c.data.suffix = " "
    loop.train_and_evaluate(c, str(folder / "run"))
    return folder / "run"


@pytest.fixture
def run(_run_folder, tmp_path):
    return shutil.copytree(_run_folder, tmp_path / "run")


def _export(*args):
    done = run_command("pfjax.export", *args)
    assert "Traceback" not in done.stderr
    return done


def _files(folder):
    return {
        x.relative_to(folder): (x.read_bytes(), x.stat().st_mtime_ns)
        for x in folder.rglob("*")
        if x.is_file()
    }


def _contents(folder):
    """Of all files, the card without the name of the folder."""
    found = {str(k): data for k, (data, _) in _files(folder).items()}
    card = found.pop("README.md").decode()
    return found, re.sub(r'model="[^"]*"|- name: hf.*', "", card)


def test_a_checkpoint_becomes_the_model_that_the_run_wrote_and_the_run_stays(run):
    (run / "checkpoints/6.orbax-checkpoint-tmp-1").mkdir()  # a save has begun
    (run / "checkpoints/6.orbax-checkpoint-tmp-1/part").write_text("x")
    (run / "owner.json").write_text("{}")  # it lives
    before = _files(run)
    done = _export(run)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"model of step 4: {run / 'hf-step-4'}\n"
    assert _contents(run / "hf-step-4") == _contents(run / "hf")
    after = {k: v for k, v in _files(run).items() if k.parts[0] != "hf-step-4"}
    assert after == before


def test_a_stopped_run_is_exported_to_hf_and_other_steps_beside_it(run):
    last, _ = _contents(run / "hf")
    shutil.rmtree(run / "hf")
    (run / "checkpoints/2/metrics/metrics").write_text('{"best": 2.0}')
    assert _export(run, "--best").returncode == 0
    assert not (run / "hf").exists()
    best, card = _contents(run / "hf-step-2")
    assert best["model.safetensors"] != last["model.safetensors"]
    assert "| metric | base | step 2 |" in card
    assert _export(run).returncode == 0
    assert _contents(run / "hf")[0] == last


def test_mistakes_are_one_line(run, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.json", tmp_path / "begun")
    (tmp_path / "file").write_text("")
    blob = max(
        (run / "checkpoints/4/state/d").iterdir(), key=lambda x: x.stat().st_size
    )
    data = bytearray(blob.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    blob.write_bytes(data)
    for args, message in [
        ((), "give one run"),
        ((tmp_path / "none",), "holds no run"),
        ((run / "hf",), "holds no run"),
        ((tmp_path / "begun",), "has no checkpoint yet"),
        ((run, "--step=3"), f"--step=3: {run} has checkpoints of [2, 4]"),
        ((run, "--step=2", "--best"), "give either --step or --best"),
        ((run, f"--out={run}"), "holds something other than a model"),
        ((run, f"--out={tmp_path / 'file'}"), "is a file"),
        ((run, "--push=a/b/c"), "--push=a/b/c: Repo id must be"),
        ((run,), f"checkpoint 4 of {run / 'checkpoints'} is damaged"),
    ]:
        before = _files(tmp_path)
        done = _export(*args)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith("error: "), args
        assert message in last, (args, last)
        assert _files(tmp_path) == before


def test_values_that_are_not_those_saved_are_refused(run, monkeypatch):
    zeros = lambda tree: jax.tree.map(lambda _: 0, tree)
    monkeypatch.setattr(checkpoint, "_checksum_each", zeros)
    done = _export(run)
    assert done.returncode == 1 and "is not what was saved" in done.stderr
    assert not (run / "hf-step-4").exists()


def test_another_base_is_refused(run):
    content = json.loads((run / "config.json").read_text())
    content["config"]["model"] = str(run / "hf")
    (run / "config.json").write_text(json.dumps(content))
    done = _export(run)
    assert done.returncode == 1 and "is no longer the model" in done.stderr


def test_push_sends_the_folder_to_a_private_repository(run, monkeypatch):
    calls = []
    repo = types.SimpleNamespace(repo_id="me/name")
    monkeypatch.setattr(
        huggingface_hub,
        "create_repo",
        lambda name, **kwargs: calls.append((name, kwargs)) or repo,
    )
    monkeypatch.setattr(
        huggingface_hub, "upload_folder", lambda **kwargs: calls.append(kwargs)
    )
    info = types.SimpleNamespace(private=True)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda _: info)
    done = _export(run, "--push=name")
    assert done.returncode == 0, done.stderr
    out = run / "hf-step-4"
    assert calls == [
        ("name", {"private": True, "exist_ok": True}),
        {"repo_id": "me/name", "folder_path": str(out)},
    ]
    assert "pushed: https://huggingface.co/me/name (private;" in done.stdout
    assert 'LLM(model="me/name")' in (out / "README.md").read_text()

    def offline(**kwargs):
        raise ConnectionError("no network\nno more")

    monkeypatch.setattr(huggingface_hub, "upload_folder", offline)
    done = _export(run, "--push=name")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "error: --push=name: no network (`hf auth login` logs in)\n"
    )


def test_the_card_says_what_the_hub_asks_for(run, tmp_path):
    base = shutil.copytree(run / "hf", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\nbase\n")
    c = ConfigDict(run_config.read_config(epath.Path(run)))
    c.model, c.data.eval = str(base), "me/held-out:test"
    rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    text = model_card.model_card(FrozenConfigDict(c), rows, "me/name")
    card = huggingface_hub.ModelCard(text)
    assert "# base toward its power distribution, alpha 4\n" in card.text
    assert "without labels" in card.text
    c.beta, c.base = 2.0, "me/other"
    text = model_card.model_card(FrozenConfigDict(c), rows, "me/name")
    assert "tilted power distribution" in text and "distribution of me/other" in text
    assert "without labels" not in text
    # With what the chat template was told, or others would ask for other responses.
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    c.data.chat_template_kwargs = '{"enable_thinking": false}'
    text = model_card.model_card(FrozenConfigDict(c), rows, "me/name")
    assert "{'enable_thinking': False}  # arguments of the chat" in text
    assert "tokenizer_encode_kwargs=template)" in text
    assert "sampling, chat_template_kwargs={'enable_thinking': False})" in text
    # At its 4 steps, not where the schedule would end.
    c.beta, c.schedules = 0.0, "alpha:1@0,5@8,beta:0@0,14@8"
    text = model_card.model_card(FrozenConfigDict(c), rows, "me/name")
    assert "of 3, times e to the power of 7 times the reward" in text
    assert f"(value@step): `{c.schedules}`" in text
    data = card.data
    assert data.license == "mit" and data.model_name == "name"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    found = {x.metric_name: x for x in data.eval_results}
    assert set(found) == {"avg@2", "maj@2", "pass@2"}
    assert found["avg@2"].dataset_type == "me/held-out"
    assert found["avg@2"].metric_value == round(rows[-1]["eval/avg@2"], 4)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"),
        ("Qwen/Qwen2.5-1.5B@main", "Qwen/Qwen2.5-1.5B"),
        ("pfjax/toy", None),
        ("runs/a/hf", None),
        ("data/train.jsonl", None),
        ("tests/model", None),
    ],
)
def test_only_names_on_the_hub_are_given_as_such(name, found):
    assert model_card.hub_id(name) == found


def test_the_command_on_the_card_gives_the_config_again(run):
    c = run_config.read_config(epath.Path(run))
    assert (
        json.loads(c.to_json())
        == json.loads((run / "config.json").read_text())["config"]
    )
    command = model_card.command(c)
    assert command.startswith("pfjax train --config=default --workdir=RUN \\\n")
    assert "  '--config.data.suffix= '" in command
    assert "--config.seed" not in command
