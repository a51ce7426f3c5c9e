"""Writers that survive a kill; what TensorBoard and W&B are given."""

import json
import struct
import tempfile
import threading

import numpy as np
import pytest
from etils import epath
from tensorboardX import SummaryWriter

from pfjax.infra import dataset_io, storage
from pfjax.infra.dataset_io import read_jsonl
from pfjax.trainer import logging, preemption, settings, tracking

CONFIG = json.loads(settings.default_config().to_json())
ROWS = [
    {
        "prompt_id": q,
        "sample": i,
        "prompt": f"{q} | 1",
        "completion": "a\nb",
        "gold": None,
    }
    for q in range(3)
    for i in range(2)
]


def test_writer_cuts_back_to_the_step_it_continues_from(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "x": s / 2}) + "\n" for s in range(5))
        + '{"step": 5, "x'  # killed while writing
    )
    with logging.Writer(epath.Path(tmp_path), 2, CONFIG) as writer:
        writer.write(3, {"x": np.float32(9)})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert rows[-1]["x"] == 9.0 and writer.history == rows


def test_a_row_is_encoded_once(tmp_path, monkeypatch):
    """A step costs as much after thousands as at the start."""
    encoded = []

    def as_jsonl(rows):
        encoded.extend(row["step"] for row in rows)
        return dataset_io.as_jsonl(rows)

    with logging.Writer(epath.Path(tmp_path), -1, CONFIG) as writer:
        monkeypatch.setattr(logging, "as_jsonl", as_jsonl)
        for step in range(5):
            writer.write(step, {"x": step})
        writer.write(4, {"x": 4, "y": 5})  # replaced by a fuller one
    assert encoded == [0, 1, 2, 3, 4, 4]
    assert read_jsonl(tmp_path / "metrics.jsonl") == writer.history
    assert writer.history[-1] == {"step": 4, "x": 4.0, "y": 5.0}


def test_a_row_is_appended_on_a_disk(tmp_path, monkeypatch):
    """Whole, the file of 10,000 steps would be 10 MB for each of them."""
    written, write = [], storage.write_text

    def write_text(path, text):
        written.append(path.name)
        write(path, text)

    monkeypatch.setattr(storage, "write_text", write_text)
    with logging.Writer(epath.Path(tmp_path), -1, CONFIG) as writer:
        for step in range(5):
            writer.write(step, {"x": step})
            assert read_jsonl(tmp_path / "metrics.jsonl") == writer.history
    assert written == ["metrics.jsonl"]  # at the start


def test_tensorboard_shows_metrics_once_the_config_and_completions(tmp_path):
    with logging.Writer(epath.Path(tmp_path), -1, CONFIG) as writer:
        writer.write(0, {"x": 1.0})
        writer.write_completions(0, ROWS)
        writer.write(0, {"x": 1.0, "eval/avg@2": 0.5})
    (file,) = tmp_path.glob("events.out.tfevents*")
    scalars, texts = [], {}
    for event in _events(file):
        for value in event.summary.value:
            if value.tensor.string_val:
                texts[value.tag] = value.tensor.string_val[0].decode()
            else:
                scalars.append((event.step, value.tag, value.simple_value))
    # The package knows no @ in names.
    assert scalars == [(0, "x", 1.0), (0, "eval/avg_2", 0.5)]
    assert '"learning_rate": 1e-06' in texts["config/text_summary"]
    shown = texts["completions/text_summary"]
    assert shown.count("    a\n    b") == 3 and "    2 | 1\n" in shown


def _events(path):
    from tensorboardX.proto.event_pb2 import Event

    data, at = path.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + size])
        at += size + 16  # with two checksums


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return pytest.importorskip("wandb")


def _offline_runs(folder):
    """Of each process that wrote to a run: all that it sent, by kind."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process writes the last at its end
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, whole, found = path.read_bytes(), 7, b"", {}
        while at < len(data):  # blocks of 32 KiB, of records in LevelDB's format
            if -at % 2**15 < 7:
                at += -at % 2**15
            _, size, kind = struct.unpack_from("<IHB", data, at)
            whole += data[at + 7 : (at := at + 7 + size)]
            if kind in (1, 4):  # complete
                record, whole = Record.FromString(whole), b""
                name = record.WhichOneof("record_type")
                found.setdefault(name, []).append(getattr(record, name))
        yield found


def _history(run):
    for row in run["history"]:
        values = {".".join(x.nested_key): json.loads(x.value_json) for x in row.item}
        yield {k: v for k, v in values.items() if not k.startswith("_")}


def test_wandb_shows_a_continued_run_as_one_with_each_value_once(tmp_path, wandb):
    """Stopped after step 2 is saved and step 3 is done, before step 2 is evaluated."""
    folder = tmp_path / "study: a" / "0"
    args = (epath.Path(folder), -1, CONFIG, "project")
    with pytest.raises(preemption.Preempted), logging.Writer(*args) as writer:
        writer.write_completions(0, ROWS)
        writer.write(0, {"eval/avg@2": 0.5, "time/eval": 1.0})
        for step in (1, 2, 3):
            writer.write(step, {"x": step})
        writer.write_completions(3, ROWS)
        writer.write(3, {"x": 3, "time/eval": 1.0})
        raise preemption.Preempted
    with logging.Writer(args[0], 2, CONFIG, "project") as writer:
        writer.write_completions(2, ROWS)
        writer.write(2, {"x": 2, "eval/avg@2": 0.75, "time/eval": 1.0})
        writer.write_completions(3, ROWS)
        writer.write(3, {"x": 3, "time/eval": 1.0})
        writer.write(4, {"x": 4})
    first, second = _offline_runs(folder)
    a, b = first["run"][0], second["run"][0]
    assert a.run_id == b.run_id == json.loads((folder / "wandb.json").read_text())["id"]
    assert (a.project, a.display_name) == ("project", "study: a/0")
    values = {x.key: json.loads(x.value_json) for x in a.config.update}
    assert values["optim"]["learning_rate"] == 1e-6
    seen = [*_history(first), *_history(second)]
    tables = [row for row in seen if "completions.nrows" in row]
    assert [t["step"] for t in tables] == [0, 3, 2]
    assert tables[0]["completions.nrows"] == 6
    assert [row for row in seen if row not in tables] == [
        {"step": 0, "eval/avg@2": 0.5, "time/eval": 1.0},
        {"step": 1, "x": 1},
        {"step": 2, "x": 2},
        {"step": 3, "x": 3},
        {"step": 3, "time/eval": 1.0},
        {"step": 2, "eval/avg@2": 0.75, "time/eval": 1.0},
        {"step": 4, "x": 4},
    ]
    assert first["preempting"] and first["exit"][0].exit_code == 75
    assert "preempting" not in second and second["exit"][0].exit_code == 0


def test_wandb_runs_of_another_seed_are_one_group_and_others_are_not(tmp_path, wandb):
    found = {}
    changes = {"a/0": {}, "b/0": {"seed": 1}, "c/0": {"alpha": 2.0}}
    for name, changed in changes.items():
        folder = tmp_path / name
        args = (epath.Path(folder), -1, {**CONFIG, **changed}, "project")
        with pytest.raises(OSError), logging.Writer(*args):
            raise OSError
        (run,) = _offline_runs(folder)
        assert run["exit"][0].exit_code == 1 and "preempting" not in run
        found[name] = run["run"][0]
    assert len({x.run_id for x in found.values()}) == 3
    groups = [x.run_group for x in found.values()]
    assert groups[0] == groups[1] != groups[2] and groups[2].startswith(
        "toy powerflow alpha 2 "
    )


def test_a_run_that_wandb_does_not_know_is_given_it_whole(tmp_path, wandb):
    with logging.Writer(epath.Path(tmp_path), -1, CONFIG) as writer:
        for step in (0, 1, 2):
            writer.write(step, {"x": step})
    with logging.Writer(epath.Path(tmp_path), 1, CONFIG, "project") as writer:
        writer.write(2, {"x": 2})
    (run,) = _offline_runs(tmp_path)
    assert list(_history(run)) == [{"step": s, "x": s} for s in range(3)]


def test_wandb_keeps_the_id_in_a_bucket_and_its_files_on_a_disk(
    tmp_path, wandb, monkeypatch, bucket
):
    local = tmp_path / "local"
    local.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(local))
    folder = storage.place(f"{bucket}/run")
    with logging.Writer(folder, -1, CONFIG, "project") as writer:
        writer.write(0, {"x": 0})
    (place,) = local.glob("pfjax-*/wandb/..")
    (run,) = _offline_runs(place)
    kept = json.loads(storage.read_text(folder / "wandb.json"))
    assert run["run"][0].run_id == kept["id"]


def test_metrics_of_a_run_in_a_bucket_cost_one_request_off_its_way(
    bucket, gcs_server, monkeypatch
):
    """And are there once it says so, before a checkpoint; events while it goes on."""
    folder, flush, threads = storage.place(f"{bucket}/run"), SummaryWriter.flush, set()

    def noted(board):
        threads.add(threading.current_thread())
        flush(board)

    monkeypatch.setattr(SummaryWriter, "flush", noted)
    with logging.Writer(folder, -1, CONFIG) as writer:
        before = len(gcs_server.requests(bucket))
        for step in range(50):
            writer.write(step, {"x": step})
        writer.flush()
        # Two at most of each file, as all of this takes less than a second or so.
        assert len(gcs_server.requests(bucket)) - before <= 6
        rows = read_jsonl(folder / "metrics.jsonl")
        assert rows == writer.history and len(rows) == 50
        (events,) = folder.glob("events.out.tfevents*")
        size = len(storage.read_bytes(events))
        writer.write(50, {"x": 50})
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl")] == [*range(51)]
    assert len(storage.read_bytes(events)) > size > 0
    with logging.Writer(folder, 30, CONFIG) as writer:
        assert len(writer.history) == 31
    # In the one that closes it: of what is closed it would end the thread that uploads.
    assert threads == {threading.current_thread()}


def test_a_wandb_that_cannot_be_used_is_one_line(tmp_path, wandb, monkeypatch):
    with pytest.raises(ValueError, match="project=a:b: Invalid project name") as error:
        logging.Writer(epath.Path(tmp_path), -1, CONFIG, "a:b")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install wandb; or leave the setting out"):
        tracking.check("p")
    tracking.check("")
