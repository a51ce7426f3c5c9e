"""Paths on this machine and in buckets, which an emulator plays."""

import ast
import errno
import http.server
import json
import os
import pathlib
import pwd
import subprocess
import sys
import threading
import time
import urllib.request

import fsspec
import pytest

from pfjax.infra import storage, uploads
from pfjax.model import hf, hub
from tests.conftest import ROOT, run_command


def test_which_are_remote():
    assert storage.is_remote("gs://bucket/run") and not storage.is_remote("/data/run")
    assert str(storage.place("~/run")) == str(pathlib.Path("~/run").expanduser())
    assert str(storage.place("gs://bucket/run") / "x") == "gs://bucket/run/x"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("gs:/bucket/run", "did you mean gs://bucket/run?"),
        ("gs://", "names no bucket: gs://BUCKET/FOLDER"),
        ("https://host/run", "on this machine or in a bucket, gs://BUCKET/"),
    ],
)
def test_what_is_no_path_is_refused(path, said):
    """Rather than made a folder of that name."""
    with pytest.raises(ValueError) as error:
        storage.place(path)
    assert said in str(error.value)


def test_a_folder_that_cannot_be_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    storage.check_writable(tmp_path / "new/deep")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ValueError, match=f"{path}: .*file is a file, not a folder"):
            storage.check_writable(path)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as for any but root
    with pytest.raises(ValueError, match=f"no permission to write in {tmp_path}"):
        storage.check_writable(tmp_path / "new")


def test_nothing_is_kept_for_a_user_without_a_home(tmp_path, monkeypatch):
    """As in a container; least of all in a folder that is called ~."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.user_cache("x") == tmp_path / "home/.cache/pfjax/x"
    monkeypatch.setenv("HOME", os.devnull)
    with pytest.raises(ValueError, match=r"~/.cache cannot be written: set XDG_"):
        storage.user_cache("x")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a user who has no name
    with pytest.raises(ValueError, match=r"~/.cache cannot be written"):
        storage.user_cache("x")
    assert [x.name for x in tmp_path.iterdir()] == ["home"]


def test_windows_is_told_where_to_go():
    """Which has no fcntl."""
    code = "import sys; sys.modules['fcntl'] = None; import pfjax.infra.storage"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert run.returncode and "on Windows, in WSL" in run.stderr.splitlines()[-1]


def test_files_reach_a_bucket_config_last(bucket, gcs_server):
    with storage.local_folder(f"{bucket}/out") as local:
        (local / "deep").mkdir()
        (local / "config.json").write_text("{}")
        (local / "deep/x.txt").write_text("x")
        (local / "y.txt").write_text("y")
        assert not gcs_server.requests(bucket)
    assert not local.exists()
    assert storage.read_text(f"{bucket}/out/deep/x.txt") == "x"
    names = storage.place(f"{bucket}/out").iterdir()
    made = {
        x.name: storage._files(x).info(str(x)).get("timeCreated", "") for x in names
    }
    assert max(made, key=made.get) == "config.json" and len(made) == 3


def test_a_small_file_is_one_request(bucket, gcs_server):
    storage.write_text(f"{bucket}/run/x", "é")
    assert len(gcs_server.requests(bucket)) == 1
    assert storage.read_text(f"{bucket}/run/x") == "é"
    assert len(gcs_server.requests(bucket)) == 2
    with pytest.raises(FileNotFoundError):
        storage.read_text(f"{bucket}/run/y")


def test_what_others_write_is_seen(bucket, gcs_server):
    """gcsfs keeps listings for ever unless it is told not to."""
    folder = storage.place(f"{bucket}/run")
    storage.write_text(folder / "a", "a")
    seen = lambda: sorted(x.name for x in folder.iterdir())
    assert seen() == ["a"] and not (folder / "b").exists()
    url = f"{gcs_server.url}/upload/storage/v1/b/{bucket[5:]}/o?uploadType=media"
    urllib.request.urlopen(f"{url}&name=run/b", b"b").close()
    assert seen() == ["a", "b"] and (folder / "b").exists()


def test_a_copy_is_made_once_and_again_when_the_files_change(
    bucket, gcs_server, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("a.json", "b.bin", "deep/c.json"):
        storage.write_text(f"{bucket}/model/{name}", name)
    copy = storage.local_copy(f"{bucket}/model", ["*.json"])
    assert [x.name for x in copy.iterdir()] == ["a.json"]
    downloads = lambda: sum("/download/" in x for x in gcs_server.requests(bucket))
    before = downloads()
    assert storage.local_copy(f"{bucket}/model", ["*.json"]) == copy
    assert downloads() == before
    storage.write_text(f"{bucket}/model/a.json", "other")
    other = storage.local_copy(f"{bucket}/model", ["*.json"])
    assert (other / "a.json").read_text() == "other"
    assert (copy / "a.json").read_text() == "a.json"
    file = storage.local_copy(f"{bucket}/model/b.bin")
    assert (file.name, file.read_text()) == ("b.bin", "b.bin")
    for path in (f"{bucket}/none", f"{bucket}/none.bin"):
        with pytest.raises(ValueError, match=f"{path} does not exist"):
            storage.local_copy(path)


def test_a_copy_that_has_no_room_is_refused(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    storage.write_text(f"{bucket}/model/a", "a")
    full = type("Usage", (), {"free": 0})
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: full)
    with pytest.raises(ValueError, match="room for 0.0: XDG_CACHE_HOME names another"):
        storage.local_copy(f"{bucket}/model")


def _answering(status: int, message: str):
    """A server that gives every request the same answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            error = {"error": {"code": status, "message": message}}
            content = json.dumps(error).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):  # requests that are given up
            pass

    return Server(("127.0.0.1", 0), Handler)


@pytest.fixture
def answered(monkeypatch):
    """Lets every bucket answer with a status and a message."""
    kind = fsspec.get_filesystem_class("gcs")
    servers = []

    def start(status, message):
        servers.append(_answering(status, message))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{servers[-1].server_port}"
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        kind.clear_instance_cache()

    pytest.importorskip("gcsfs")
    yield start
    kind.clear_instance_cache()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (
            403,
            "x@y does not have storage.objects.create access",
            "roles/storage.object",
        ),
        (401, "Anonymous caller does not have access", "application-default login"),
        (404, "The specified bucket does not exist.", "there is no bucket gs://b: "),
        (400, "Bucket is odd", "gs://b/run: the bucket does not answer: HttpError: "),
    ],
)
def test_what_is_wrong_with_a_bucket_is_one_line(
    answered, caplog, status, message, said
):
    answered(status, message)
    for ask in (storage.check_writable, storage.exists, storage.local_copy):
        with pytest.raises(ValueError) as error:
            ask("gs://b/run")
        assert isinstance(error.value, OSError)
        assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(OSError):
        storage.write_text("gs://b/run/x", "x")
    assert not caplog.records  # which are printed, with stacks


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for name in ("gs", "gcs"):
        registered = sys.modules["fsspec.registry"]._registry
        monkeypatch.delitem(registered, name, raising=False)
    with pytest.raises(ValueError) as error:
        storage.check_writable("gs://b/run")
    assert "gs:// needs the package gcsfs: pip install 'pfjax[gcs]'" in str(error.value)


@pytest.mark.parametrize(
    ("module", "args"),
    [
        ("pfjax.train", ["--config=smoke", "--workdir=gs://pfjax-none/run"]),
        ("pfjax.train", ["--config=smoke", "--workdir=/dev/null/run"]),
        (
            "pfjax.train",
            ["--config=smoke", "--workdir=W", "--config.model=gs://pfjax-none/m"],
        ),
        (
            "pfjax.train",
            [
                "--config=smoke",
                "--workdir=W",
                "--config.data.train=gs://pfjax-none/p.csv",
            ],
        ),
        ("pfjax.sample", ["--prompt=x", "--model=gs://pfjax-none/m"]),
        ("pfjax.sample", ["--prompts=gs://pfjax-none/p.jsonl"]),
        ("pfjax.sample", ["--prompt=x", "--out=gs://pfjax-none/out.jsonl"]),
        ("pfjax.evaluate", ["--benchmark=gs://pfjax-none/p.jsonl", "--out=W"]),
        (
            "pfjax.evaluate",
            ["--benchmark=math500", "--data=gs://pfjax-none/sets", "--out=W"],
        ),
        (
            "pfjax.evaluate",
            ["--benchmark=pfjax/toy/eval.jsonl", "--out=gs://pfjax-none/scores"],
        ),
        ("pfjax.export", ["gs://pfjax-none/run"]),
        ("pfjax.report", ["gs://pfjax-none/run"]),
    ],
)
def test_commands_say_it_before_a_model_is_loaded(
    bucket, module, args, tmp_path, monkeypatch
):
    loaded = []
    monkeypatch.setattr(hf, "load", lambda *args, **kwargs: loaded.append(args))
    done = run_command(module, *(x.replace("=W", f"={tmp_path}/w") for x in args))
    said = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(said) == 1, done.stderr
    assert "there is no bucket gs://pfjax-none: " in said[0] or "/dev/null" in said[0]
    assert not loaded and not (tmp_path / "w").exists()


def test_a_background_write_waits_for_none_and_keeps_the_newest(bucket, gcs_server):
    path = storage.place(f"{bucket}/metrics")
    with uploads.Uploads() as background:
        background.put(path, b"first".strip)
        background.flush()
        for i in range(50):
            background.put(path, str(i).encode)
            time.sleep(0.02)
        background.flush()
        assert storage.read_text(path) == "49"
        background.put(path, b"last".strip)
    assert storage.read_text(path) == "last"
    writes = [x for x in gcs_server.requests(bucket) if x.startswith("POST")]
    assert 3 <= len(writes) <= 6  # GCS takes one a second


def test_what_could_not_be_written_is_tried_again_and_said(monkeypatch):
    written, is_down = [], True

    def write(path, content):
        if is_down:
            raise storage.BucketError("down")
        written.append((path, content))

    monkeypatch.setattr(storage, "write_bytes", write)
    monkeypatch.setattr(uploads, "_EVERY", 0.01)
    with uploads.Uploads() as background:
        background.put("a", b"1".strip, 0.01)
        time.sleep(0.05)
        with pytest.raises(OSError, match="down"):
            background.flush()
        is_down = False
        background.flush()
    assert written == [("a", b"1")]
    is_down = True
    with pytest.raises(OSError, match="down"), uploads.Uploads() as background:
        background.put("b", b"2".strip)


def test_a_growing_file_is_whole_in_the_end(bucket, tmp_path):
    for path in (f"{bucket}/out.jsonl", f"{tmp_path}/new/out.jsonl"):
        with pytest.raises(KeyboardInterrupt), uploads.growing(path, "a\n") as add:
            add("b\n")
            raise KeyboardInterrupt
        assert storage.read_text(path) == "a\nb\n"
        with uploads.growing(path, "c\n"):
            pass
        assert storage.read_text(path) == "c\n"


def test_a_model_is_told_from_another_of_the_same_shape(tmp_path):
    policy = hf.load("pfjax/toy")
    for name, scale in (("a", 1.0), ("b", 1.0), ("c", 1.001)):
        params = {**policy.params, "embed": scale * policy.params["embed"]}
        hf.save(policy._replace(params=params), tmp_path / name, base="pfjax/toy")
    a, b, c = (hub.fingerprint(tmp_path / x) for x in "abc")
    assert a == b != c


# Calls that know paths of this machine alone, and where they are about no path of a
# person's. All others go through storage.py.
_LOCAL = (
    "open",
    "pathlib.Path",
    "epath.Path",
    "os.listdir",
    "os.makedirs",
    "os.remove",
)
_LOCAL_ENDS = (".expanduser", ".rglob")
_LOCAL_MODULES = ("os.path.", "glob.", "shutil.")
_OURS = {
    "pathlib.Path(__file__)": "a file of pfjax",
    "os.path.dirname(__file__)": "a file of pfjax",
    "epath.Path(_ASSETS / source.removeprefix('pfjax/'))": "a file of pfjax",
    "pathlib.Path(sys.executable)": "Python",
    "shutil.which('pfjax')": "Python",
    "shutil.which(python.name)": "Python",
    "os.path.join('.', python.relative_to(here))": "Python",
    "shutil.get_terminal_size()": "no path",
    "os.path.samestat(output, gone)": "no path",
    "os.path.relpath(frame.filename)": "of a message",
    "os.path.basename(frame.filename)": "of a message",
    "os.path.basename(x.filename)": "of a message",
    "os.path.basename(spec.rpartition(':')[0])": "of a message",
    "open('/proc/meminfo', encoding='utf-8')": "of the machine",
    "pathlib.Path(f'/proc/{pid}/stat')": "of the machine",
    "pathlib.Path(os.devnull)": "of the machine",
    "pathlib.Path('/proc/sys/kernel/random/boot_id')": "of the machine",
    "pathlib.Path('/proc/stat')": "of the machine",
    "pathlib.Path(huggingface_hub.snapshot_download(hub_id, **wanted))": "a download",
    "pathlib.Path(beside)": "a temporary folder",
    "pathlib.Path(self._stack.enter_context(new))": "a temporary folder",
    "pathlib.Path(storage.place(out_dir))": "after what is in a bucket has returned",
    "shutil.copyfile(file, place)": "into a temporary folder",
    "open(path, 'wb')": "below storage.local_folder",
    "pathlib.Path(workdir)": "replaced where it is in a bucket",
    "pathlib.Path(out)": "where it is in no bucket",
    "os.path.ismount(here)": "where it is in no bucket",
    "os.path.realpath(folder)": "where it is in no bucket",
    "pathlib.Path(head)": "code: a recipe of this checkout",
    "pathlib.Path(where)": "a worker that imports nothing of pfjax; given a local copy",
    "pathlib.Path(where).expanduser()": "as above",
}


def test_no_path_goes_around_storage():
    found, package = {}, ROOT / "pfjax"
    for file in package.rglob("*.py"):
        if file.parent.name == "infra" and file.name in ("storage.py", "uploads.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                is_local = name in _LOCAL or name.endswith(_LOCAL_ENDS)
                if is_local or name.startswith(_LOCAL_MODULES):
                    found[ast.unparse(node)] = f"{file.relative_to(ROOT)}:{node.lineno}"
    around = {where: call for call, where in found.items() if call not in _OURS}
    assert not around, "go through pfjax.infra.storage, which knows buckets too"
    assert not _OURS.keys() - found.keys(), "no longer there"


def test_json_that_was_cut_short_is_named_in_one_line(tmp_path):
    path = tmp_path / "a.json"
    for content in (b'{"a": ', b"\xff{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{path} is not JSON[^\n]*$"):
            storage.read_json(path)
    path.write_text('{"a": 1}')
    assert storage.read_json(path) == {"a": 1}
    with pytest.raises(FileNotFoundError):
        storage.read_json(tmp_path / "b.json")


def test_a_full_disk_says_of_which_file(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(storage.place(tmp_path)), "write_bytes", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/a.json'"):
        storage.write_text(tmp_path / "a.json", "{}")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a full device")
def test_a_disk_that_fills_up_says_of_which_file():
    with (
        pytest.raises(OSError, match="No space left on device: '/dev/full'"),
        uploads.growing("/dev/full") as add,
    ):
        add("a")


def test_a_device_or_pipe_is_written_to_and_a_link_stays_one(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    read = []
    read_all = lambda: read.append(pipe.read_text())
    reader = threading.Thread(target=read_all, daemon=True)
    reader.start()
    with uploads.growing(pipe) as add:
        add("a\n")
        add("b\n")
    reader.join(timeout=10)
    assert read == ["a\nb\n"] and pipe.is_fifo()
    (link := tmp_path / "link.json").symlink_to(there := tmp_path / "there.json")
    storage.write_text(link, "{}")
    assert link.is_symlink() and there.read_text() == "{}"
    # What lies beside it is not taken for what is half written.
    (other := tmp_path / "there.tmp").write_text("mine")
    storage.write_text(there, "[]")
    assert other.read_text() == "mine" and there.read_text() == "[]"
