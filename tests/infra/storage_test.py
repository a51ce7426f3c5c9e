"""Folders in buckets, played by local ones."""

import pathlib

import pytest
from etils import epath

from pfjax.infra import storage
from pfjax.model import hf


def test_which_are_remote():
    assert storage.is_remote("gs://bucket/run") and not storage.is_remote("/data/run")
    assert str(storage.place("~/run")) == str(pathlib.Path("~/run").expanduser())


def test_a_folder_that_cannot_be_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    storage.check_writable(tmp_path / "new/deep")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ValueError, match=f"{path}: .*file is a file, not a folder"):
            storage.check_writable(path)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as for any but root
    with pytest.raises(ValueError, match=f"no permission to write in {tmp_path}"):
        storage.check_writable(tmp_path / "new")


def test_files_reach_a_bucket_config_last(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "is_remote", lambda _: True)
    out, order = tmp_path / "bucket", []
    kind = type(epath.Path(tmp_path))
    copy = kind.copy

    def recorded(self, to, overwrite):
        order.append(self.name)
        copy(self, to, overwrite=overwrite)

    monkeypatch.setattr(kind, "copy", recorded)
    with storage.local_folder(out) as local:
        (local / "deep").mkdir()
        (local / "config.json").write_text("{}")
        (local / "deep/x.txt").write_text("x")
        (local / "y.txt").write_text("y")
        assert local != out and not out.exists()
    assert (out / "deep/x.txt").read_text() == "x"
    assert order[-1] == "config.json" and len(order) == 3
    assert not local.exists()


def test_a_model_is_told_from_another_of_the_same_shape(tmp_path):
    policy = hf.load("pfjax/toy")
    for name, scale in (("a", 1.0), ("b", 1.0), ("c", 1.001)):
        params = {**policy.params, "embed": scale * policy.params["embed"]}
        hf.save(policy._replace(params=params), tmp_path / name, base="pfjax/toy")
    a, b, c = (hf.fingerprint(tmp_path / x) for x in "abc")
    assert a == b != c
