"""Eight fake CPU devices, strict settings, and models small enough to enumerate."""

import collections
import contextlib
import io
import json
import os
import pathlib
import runpy
import shutil
import socket
import subprocess
import sys
import time
import traceback

# A test that asks the hub fails at once instead of waiting for a network. Before the
# imports, which read it.
os.environ["HF_HUB_OFFLINE"] = "1"

import jaxlib.version

_PLATFORM = os.environ.get("PFJAX_TEST_PLATFORM", "cpu")
# For `compiler_options` of jit: compiled as outside of the tests.
AS_OUTSIDE = None
if _PLATFORM == "cpu" and jaxlib.version.__version_info__ < (0, 11):
    # XLA's newer code for loops takes twice as long to compile unoptimised, as most tests do;
    # what it makes is faster by a fifth in training. JAX 0.12 has no other. What the README
    # says is run without the flag.
    AS_OUTSIDE = {"xla_cpu_use_fusion_emitters": True}
    _flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join({*_flags, "--xla_cpu_use_fusion_emitters=false"})

import jax
import jaxtyping
import numpy as np
import pytest
from absl import flags

from tests import fork_server, gcs

# The kernels' tests run on a GPU or TPU too (launch/benchmark.sh).
jax.config.update("jax_platforms", _PLATFORM)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
ROOT = pathlib.Path(__file__).parent.parent
has_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/fd"), reason="asks Linux about processes, in /proc"
)
# Many tests compile the same program; workers share it, and the next run finds it.
_CACHE = pathlib.Path(
    os.environ.setdefault("PFJAX_TEST_CACHE", str(ROOT / ".pytest_cache/compiled"))
)
_CACHE_BYTES = 2**30
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
_hook = jaxtyping.install_import_hook(fork_server.ARRAY_MODULES, "beartype.beartype")

from pfjax.infra import compile_cache

compile_cache.order_collectives()


def pytest_sessionfinish(session):
    """Empties the cache once the programs of earlier trees have filled it."""
    if hasattr(session.config, "workerinput") or not _CACHE.exists():
        return
    if sum(x.stat().st_size for x in _CACHE.iterdir()) > _CACHE_BYTES:
        shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Files with many slow tests come first, so that no worker ends with a long one; in a
    file those that compute for long come last, as they may be skipped."""
    slow = collections.Counter(x.path for x in items if x.get_closest_marker("slow"))
    is_long = lambda x: x.get_closest_marker("long_running") is not None
    items.sort(key=lambda x: (-slow[x.path], x.path, is_long(x)))


# Seconds since the epoch: .ci/run has no time after it for slow tests that compute for
# long, and 20 minutes later for none.
_SLOW_UNTIL = float(os.environ.get("PFJAX_SLOW_UNTIL", "inf"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skips what there is no time for. Programs are not optimised: most tests compile for
    longer than they compute, a third of the time of all."""
    is_long = item.get_closest_marker("long_running") is not None
    until = _SLOW_UNTIL + (0 if is_long else 1200)
    if item.get_closest_marker("slow") and time.time() > until:
        pytest.skip("a slow test, and this machine is slow: no time is left")
    jax.config.update("jax_disable_most_optimizations", not is_long)


# Of the 65,530 maps of memory that Linux gives a process by default. A program has up to
# 40; to count them takes as long as a quick test.
_MANY_MAPS = 25_000
_FEW_PROGRAMS = 100
_new_programs = []


def _note_program(event, seconds, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
        _new_programs.append(event)


jax.monitoring.register_event_duration_secs_listener(_note_program)


@pytest.fixture(autouse=True)
def _forget_programs():
    """Compiled programs are dropped once they are many: each is some maps of memory,
    and where they are spent the process dies of a segmentation fault."""
    yield
    if len(_new_programs) < _FEW_PROGRAMS:
        return
    _new_programs.clear()
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny_config():
    """A Qwen2 with grouped heads, too small to care."""
    from pfjax.model import rope
    from pfjax.model.families import qwen2

    return qwen2.Config(
        vocab_size=16,
        embed_dim=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=32,
        rope=rope.RopeConfig(theta=10_000.0),
        norm_eps=1e-6,
        tied_embeddings=False,
        max_positions=128,
        stop_ids=(1,),
    )


@pytest.fixture
def tiny_policy(tiny_config, _tiny_params):
    """Random weights, every one of which matters (biases and norms too)."""
    from pfjax.model import transformer

    # Another tree each time, of the same arrays.
    return transformer.Policy(tiny_config, jax.tree.map(lambda x: x, _tiny_params))


@pytest.fixture(scope="session")
def _tiny_params(tiny_config):
    from pfjax.model import transformer

    params = transformer.init_params(tiny_config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        x + 0.3 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


@pytest.fixture
def enumerable_folder(tmp_path, _enumerable_folder) -> pathlib.Path:
    """A Hugging Face folder of a random model over 4 tokens, and its tokenizer.

    Token 1 ends a response. Of at most 3 tokens there are 1 + 3 + 9 + 27 responses.
    """
    return pathlib.Path(shutil.copytree(_enumerable_folder, tmp_path / "enumerable"))


@pytest.fixture(scope="session")
def _enumerable_folder(tmp_path_factory) -> pathlib.Path:
    from pfjax.model import hf, rope, transformer
    from pfjax.model.families import qwen2

    config = qwen2.Config(
        vocab_size=4,
        embed_dim=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=32,
        rope=rope.RopeConfig(theta=10_000.0),
        norm_eps=1e-6,
        tied_embeddings=False,
        max_positions=64,
        stop_ids=(1,),
    )
    params = transformer.init_params(config, jax.random.key(8))
    # Sharper than at initialisation, so that base and target are far apart.
    params["head"] = 2.0 * params["head"]
    folder = tmp_path_factory.mktemp("enumerable")
    hf.save(transformer.Policy(config, params), folder)
    words = ["<pad>", "<eos>", "a", "b"]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {w: i for i, w in enumerate(words)},
            "unk_token": "<pad>",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "pad_token": "<pad>",
                "eos_token": "<eos>",
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def gcs_server():
    """An emulator of Google Cloud Storage, on loopback."""
    with gcs.serve() as server:
        yield server


@pytest.fixture
def bucket(gcs_server, monkeypatch):
    """gs://NAME of an empty bucket there, for this process and those that it starts."""
    for name, value in gcs_server.env.items():
        monkeypatch.setenv(name, value)
    return gcs_server.new_bucket()


@pytest.fixture
def tpu_mesh(monkeypatch):
    """Makes a mesh of a real TPU topology, to lower and compile for without one."""
    pytest.importorskip("libtpu")
    from pfjax.planner import aot

    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # workers of pytest-xdist
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    return aot.tpu_mesh


def use_one_device(patch: pytest.MonkeyPatch) -> None:
    """Meshes are of the first device from now on, where none are named."""
    from pfjax.infra import sharding

    make = sharding.make_mesh
    first = jax.devices()[:1]
    patch.setattr(
        sharding,
        "make_mesh",
        lambda *args, **sizes: make(*args, devices=first, **sizes),
    )


def run_command(
    module: str, *args: object, cwd: pathlib.Path = ROOT
) -> subprocess.CompletedProcess:
    """Does `python -m module args` in this process, on one device.

    The command finds no flags but those it defines. Flags, environment and settings of
    JAX are afterwards what they were.
    """
    settings = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in settings}
    environment = dict(os.environ)
    argv = [module, *map(str, args)]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        _flags_of_its_own(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        use_one_device(patch)
        patch.chdir(cwd)
        patch.setattr(sys, "argv", argv)
        # The code of a module that is run is kept where processes without type checks
        # look for it.
        patch.setattr(sys, "dont_write_bytecode", True)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except Exception:  # noqa: BLE001, what ends the process
            status = 1
            traceback.print_exc()
        finally:
            os.environ.clear()
            os.environ.update(environment)
            for name, value in before.items():
                jax.config.update(name, value)
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _flags_of_its_own():
    """Hides the flags of this package, and forgets those defined inside."""
    import pfjax

    def forget_module():
        vars(pfjax).pop("cli", None)
        return sys.modules.pop("pfjax.cli", None)

    module = forget_module()
    hidden = {name: flags.FLAGS[name] for name in flags.FLAGS if _is_ours(name)}
    flags.FLAGS.remove_flag_values(hidden)
    others = set(flags.FLAGS)
    try:
        yield
    finally:
        forget_module()
        flags.FLAGS.remove_flag_values(
            # What absl defines at its first use is for all.
            {
                name
                for name in set(flags.FLAGS) - others
                if _is_ours(name) or not _module(name).startswith("absl")
            }
        )
        flags.FLAGS.unparse_flags()
        if module:
            sys.modules["pfjax.cli"] = module
        for name, flag in hidden.items():
            flags.FLAGS[name] = flag


def _is_ours(flag: str) -> bool:
    # A command names itself by its file, functions that are checked by what checks them;
    # overrides of settings belong to no module.
    ours = ("pfjax", str(ROOT / "pfjax"), "jaxtyping")
    return _module(flag).startswith(ours) or flag.startswith("config")


def _module(flag: str) -> str:
    return flags.FLAGS.find_module_defining_flag(flag) or ""


def run_on_two_processes(code: str, *args: object) -> None:
    """Runs code on 2 processes of 4 devices; it finds `args` as strings."""
    head = (
        "import sys, jax\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        "jax.config.update('jax_num_cpu_devices', 4)\n"
        "port, index, *args = sys.argv[1:]\n"
        "jax.distributed.initialize(f'localhost:{port}', 2, int(index))\n"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", head + code, port, str(i), *map(str, args)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors


@contextlib.contextmanager
def count_compiles():
    """Programs compiled inside, by name; those from the persistent cache count."""
    n: collections.Counter = collections.Counter()

    def on(event, seconds, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            n[kwargs.get("fun_name", "?")] += 1

    jax.monitoring.register_event_duration_secs_listener(on)
    try:
        yield n
    finally:
        jax.monitoring.unregister_event_duration_listener(on)


def all_responses(vocab: int, stop: int, max_tokens: int) -> list[list[int]]:
    """Every response: those that stop, and those cut at `max_tokens`."""
    done, open_ = [], [[]]
    for length in range(1, max_tokens + 1):
        grown = [y + [v] for y in open_ for v in range(vocab)]
        done += [y for y in grown if y[-1] == stop or length == max_tokens]
        open_ = [y for y in grown if y[-1] != stop]
    return done


def length_aware_target(log_p, length, alpha: float) -> tuple[np.ndarray, float]:
    """p^alpha e^{-lambda |y|} and the lambda for which it sums to 1, by bisection."""
    log_p, length = np.asarray(log_p, np.float64), np.asarray(length)
    low, high = -50.0, 50.0
    for _ in range(200):
        lam = (low + high) / 2
        low, high = (
            (lam, high)
            if np.exp(alpha * log_p - lam * length).sum() > 1
            else (low, lam)
        )
    return np.exp(alpha * log_p - lam * length), lam


def of_tokens(log_p):
    """Of each response of the enumerable model its tokens, each with the distribution that it
    is drawn from, from the log-probs of all responses."""
    responses = [tuple(y) for y in all_responses(vocab=4, stop=1, max_tokens=3)]
    mass = collections.Counter()  # of all that begin so
    for y, p in zip(responses, np.exp(log_p), strict=True):
        mass.update({y[:t]: p for t in range(len(y) + 1)})
    after = lambda y: np.array([mass[(*y, v)] for v in range(4)]) / mass[y]
    return [[(after(y[:t]), y[t]) for t in range(len(y))] for y in responses]


def log_power(log_p, alpha: float, eta_cutoff: float = 0.0) -> np.ndarray:
    """log p^alpha of all responses of that model, of rare tokens log p."""

    def of_token(p, token):
        entropy = -(p * np.log(p)).sum()
        is_rare = p[token] < min(eta_cutoff, eta_cutoff**0.5 * np.exp(-entropy))
        return np.log(p[token]) * (1.0 if is_rare else alpha)

    return np.array([sum(of_token(*x) for x in y) for y in of_tokens(log_p)])


def power_target(log_p, alpha: float) -> tuple[np.ndarray, float]:
    """p^alpha / Z and log Z."""
    weight = np.exp(alpha * np.asarray(log_p, np.float64))
    return weight / weight.sum(), float(np.log(weight.sum()))


def total_variation(p, q) -> float:
    return 0.5 * float(np.abs(np.asarray(p) - np.asarray(q)).sum())
