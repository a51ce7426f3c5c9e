"""Imports point one way; importing pfjax costs and changes nothing."""

import ast
import contextlib
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest

import pfjax

PACKAGE = pathlib.Path(__file__).parent.parent / "pfjax"
# Each imports itself and what stands before it. "infra" holds the pure modules too.
FLOORS = [
    "infra",
    "model",
    "sampler",
    "tasks",
    "evaluation",
    "trainer",
    "planner",
    "report",
    "api",
    "cli",
    "entry point",
]
PURE = {"batch", "losses", "objectives", "packing", "targets"}


def _modules() -> dict[str, pathlib.Path]:
    return {
        ".".join(("pfjax", *p.relative_to(PACKAGE).with_suffix("").parts)): p
        for p in PACKAGE.rglob("*.py")
        if p.name != "__init__.py"
    }


def _imports(path: pathlib.Path, modules) -> set[str]:
    """Modules of pfjax that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{a.name}" for a in node.names} | {node.module}
            found |= names & set(modules)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names} & set(modules)
    return found


def _floor(module: str) -> int:
    _, first, *rest = module.split(".")
    if rest[-1:] == ["__main__"]:
        return FLOORS.index("entry point")
    if rest or first in ("api", "cli"):
        return FLOORS.index(first)
    return FLOORS.index("infra" if first in PURE else "entry point")


def test_imports_point_one_way_and_nobody_imports_an_entry_point():
    modules = _modules()
    for name, path in modules.items():
        for other in _imports(path, modules):
            assert _floor(other) <= _floor(name), f"{name} imports {other}"
            assert FLOORS[_floor(other)] != "entry point", f"{name} imports {other}"


def test_no_circles():
    modules = _modules()
    graph = {name: _imports(path, modules) - {name} for name, path in modules.items()}
    while leaves := [name for name, others in graph.items() if not others]:
        graph = {n: o - set(leaves) for n, o in graph.items() if n not in leaves}
    assert not graph, f"import each other: {sorted(graph)}"


def _python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_changes_no_environment_and_starts_no_back_end():
    _python(
        "import os, sys; before = dict(os.environ)\n"
        "import pfjax\n"
        "assert dict(os.environ) == before\n"
        "heavy = {'jax', 'flax', 'transformers', 'datasets', 'torch', 'orbax'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import pfjax.trainer.loop\n"
        "assert 'torch' not in sys.modules\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )


def test_losses_need_jax_alone():
    _python(
        "import sys\n"
        "class Nothing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('flax', 'optax', 'orbax', 'jaxtyping',\n"
        "                'transformers', 'beartype', 'ml_collections', 'absl'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "import pfjax\n"
        "pfjax.losses.powerflow\n"
    )


def _names(requirements: list[str] | None) -> set[str]:
    """Names of distributions in requirements, normalised."""
    heads = (re.match(r"[\w.-]+", r)[0] for r in requirements or [])
    return {re.sub(r"[-_.]+", "-", name).lower() for name in heads}


def test_whatever_the_package_imports_is_declared():
    """In requirements, or in those of what is required."""
    declared = _names(importlib.metadata.requires("pfjax"))
    for name in tuple(declared):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            declared |= _names(importlib.metadata.requires(name))
    owners = importlib.metadata.packages_distributions()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {n.partition(".")[0] for n in names}:
                if name != "pfjax" and name not in sys.stdlib_module_names:
                    assert _names(owners[name]) & declared, f"{path} imports {name}"


@pytest.mark.parametrize("name", pfjax.__all__)
def test_public_names_resolve(name):
    assert getattr(pfjax, name).__name__.rpartition(".")[2] == name
    assert name in dir(pfjax)


def test_editors_see_what_is_exported():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (guarded,) = (x for x in tree.body if isinstance(x, ast.If))
    seen = {
        alias.name: None if node.module == "pfjax" else node.module
        for node in guarded.body
        for alias in node.names
    }
    assert seen == pfjax._EXPORTS
    assert sorted(seen) == pfjax.__all__
    assert (PACKAGE / "py.typed").exists()
