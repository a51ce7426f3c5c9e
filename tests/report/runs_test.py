"""Folders read back, and which runs are one group."""

import pytest

from pfjax.report import runs
from tests.report import fake_runs


def _groups(*folders):
    return runs.group(runs.load([str(f) for f in folders]))


def _names(tmp_path, *settings):
    for i, some in enumerate(settings):
        fake_runs.make(tmp_path / f"run{i:02d}", **some)
    return [g.name for g in _groups(tmp_path)]


def test_seeds_and_what_touches_records_or_speed_make_no_other_group(tmp_path):
    fake_runs.make(tmp_path / "a", seed=1)
    fake_runs.make(tmp_path / "b", seed=0, log_every=9, mesh={"data": 2})
    fake_runs.make(tmp_path / "c", seed=0, alpha=0.5)
    both, flat = _groups(tmp_path)
    assert [r.config["seed"] for r in both.runs] == [0, 1]
    assert (both.name, flat.name) == ("alpha 4", "alpha 0.5")
    assert both.evaluated == [0, 4] and len(both.first) == 2


def test_a_run_is_read_as_it_was_written(tmp_path):
    fake_runs.make(tmp_path / "a")
    (run,) = runs.load([str(tmp_path / "a")])
    assert run.config["optim.learning_rate"] == 0.001
    assert run.versions["jax"] == "0.10.2"
    assert [r["step"] for r in run.rows] == [0, 1, 2, 3, 4]
    first, second = runs.read_problems(run, 4)
    assert first.key == (0, "problem 0", "") and len(first.samples) == 2
    assert (first.num_correct, second.num_correct) == (2, 1)
    assert runs.read_problems(run, 3) == []


def test_names_are_the_least_that_tells_groups_apart(tmp_path):
    one = _names(tmp_path / "one", {})
    assert one == ["powerflow, alpha 4"]
    by_objective = _names(
        tmp_path / "objective",
        {},
        {"objective": "grpo", "optim": {"learning_rate": 0.1}},
    )
    assert by_objective == ["powerflow", "grpo"]
    by_rate = _names(tmp_path / "rate", {}, {"optim": {"learning_rate": 3e-4}})
    assert by_rate == ["learning rate 0.001", "learning rate 0.0003"]
    # What more than three quarters have goes without saying.
    many = [{"alpha": float(a)} for a in range(1, 6)]
    usual = _names(tmp_path / "usual", *many, {"alpha": 1.0, "log_z": "group"})
    assert usual[:2] == ["alpha 1", "alpha 2"] and usual[5] == "alpha 1, log z group"


def test_a_label_names_and_merges(tmp_path):
    for i, alpha in enumerate((4.0, 3.9)):
        folder = fake_runs.make(tmp_path / str(i), seed=i, alpha=alpha)
        (folder / "label.txt").write_text("sharp & sure\n")
    fake_runs.make(tmp_path / "other", alpha=0.5)
    labelled, other = _groups(tmp_path)
    assert labelled.name == "sharp & sure" and len(labelled.runs) == 2
    assert other.name == "powerflow, alpha 0.5"
    (tmp_path / "other/label.txt").write_text("flat\n")  # none is left to be named
    assert [g.name for g in _groups(tmp_path)] == ["sharp & sure", "flat"]


def test_runs_are_found_below_once_in_the_order_given(tmp_path):
    fake_runs.make(tmp_path / "study/deep/a")
    fake_runs.make(tmp_path / "study/b", answers={}, alpha=2.0)
    found = runs.load([str(tmp_path), str(tmp_path / "study/deep")])
    assert [r.folder.name for r in found] == ["b", "a"]
    found = runs.load([str(tmp_path / "study/deep"), str(tmp_path)])
    assert [r.folder.name for r in found] == ["a", "b"]
    assert [g.name for g in runs.group(found)] == ["alpha 4", "alpha 2"]


def test_a_run_that_was_not_evaluated_has_its_steps(tmp_path):
    fake_runs.make(tmp_path / "a", answers={})
    (group,) = _groups(tmp_path)
    assert (group.evaluated, group.first, group.last) == ([], [], [])
    assert group.last_step == 4


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = fake_runs.make(tmp_path / "a") / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    (run,) = runs.load([str(tmp_path / "a")])
    assert [r["step"] for r in run.rows] == [0, 1, 2, 3]


def test_mistakes_say_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("empty", "absent"):
        with pytest.raises(ValueError, match=f"{path} holds no run"):
            runs.load([str(tmp_path / path)])
    broken = fake_runs.make(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        runs.load([str(broken)])


def test_a_group_goes_as_far_as_all_of_its_runs(tmp_path):
    fake_runs.make(tmp_path / "a", seed=0)
    early = {k: v for k, v in fake_runs.SEED_1.items() if k == 0}
    fake_runs.make(tmp_path / "b", seed=1, answers=early)
    (group,) = _groups(tmp_path)
    assert group.evaluated == [0]


def test_a_problem_cut_short_by_a_kill_is_left_out(tmp_path):
    folder = fake_runs.make(tmp_path / "a")
    path = folder / "completions/step_000004.jsonl"
    path.write_text(path.read_text()[:-30])
    (run,) = runs.load([str(folder)])
    assert [p.key[0] for p in runs.read_problems(run, 4)] == [0]


def test_settings_are_shared_or_differ(tmp_path):
    fake_runs.make(tmp_path / "a", seed=0)
    fake_runs.make(tmp_path / "b", seed=1, alpha=0.5, log_z="group")
    shared, differ = runs.settings(_groups(tmp_path))
    assert differ == {"alpha": ["4", "0.5"], "log_z": ["not set", "group"]}
    assert shared["optim.learning_rate"] == "0.001" and "seed" not in shared


def test_the_match_of_a_run_is_read_as_of_its_last_step(tmp_path):
    folder = fake_runs.make(tmp_path / "a")
    assert not any("match/exponent" in row for row in runs.load([str(folder)])[0].rows)
    (folder / "match.json").write_text('{"exponent": 3.6}')
    (run,) = runs.load([str(folder)])
    assert run.rows[-1]["match/exponent"] == 3.6 and run.rows[-1]["step"] == 4
    assert "match/exponent" not in run.rows[0]


def test_the_match_of_an_older_step_is_not_shown_as_that_of_the_last(tmp_path):
    folder = fake_runs.make(tmp_path / "a")
    (folder / "match.json").write_text('{"step": 4, "exponent": 3.6}')
    assert runs.load([str(folder)])[0].rows[-1]["match/exponent"] == 3.6
    (folder / "match.json").write_text('{"step": 2, "exponent": 3.6}')
    (run,) = runs.load([str(folder)])
    assert not any("match/exponent" in row for row in run.rows)


def test_a_file_that_was_cut_short_is_named(tmp_path):
    folder = fake_runs.make(tmp_path / "a")
    (folder / "match.json").write_text('{"exponent"')
    with pytest.raises(ValueError, match=r"^[^\n]*match\.json is not JSON[^\n]*$"):
        runs.load([str(folder)])


def test_what_a_continued_run_may_change_makes_no_other_group_but_its_evaluations(
    tmp_path,
):
    fake_runs.make(tmp_path / "a", reward_workers=1, rollout_tensor=1)
    fake_runs.make(tmp_path / "b", reward_workers=2, rollout_tensor=2)
    fake_runs.make(tmp_path / "c", eval_samples=3)
    both, other = _groups(tmp_path)
    assert len(both.runs) == 2 and len(other.runs) == 1


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("metrics.jsonl", '{"step": 1, "entropy": "x"}\n', "entropy='x' in the row"),
        ("match.json", "[]", "not as a run"),
        ("scores/alpha-2/x.json", '{"scores": {"avg@2": 1}}', "not as a run"),
        ("completions/step_000004.jsonl", '{"prompt": "a"}\n', "not as a run"),
        ("label.txt", "\udcff", "not UTF-8"),
    ],
)
def test_a_file_that_is_not_as_it_was_written_is_named(tmp_path, name, text, said):
    run = fake_runs.make(tmp_path / "a")
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"{path.name}.*{said}"):
        _groups(run)


def test_null_in_metrics_and_other_files_beside_the_completions_are_passed_over(
    tmp_path,
):
    run = fake_runs.make(tmp_path / "a")
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics + '{"step": 5, "entropy": null}\n')
    (run / "completions/step_000004_old.jsonl").write_text("x")
    (group,) = _groups(run)
    assert group.last_step == 5 and group.evaluated == [0, 4]
