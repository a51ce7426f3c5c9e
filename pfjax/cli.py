"""What entry points share: flags, the model they name, and mistakes as one line."""

import ast
import contextlib
import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from absl import flags
from etils import epy
from ml_collections import config_flags

from pfjax.sampler import options

with epy.lazy_imports():  # flags are parsed, and --help answers, without them
    import jax

    from pfjax.infra import compile_cache, distributed, sharding
    from pfjax.model import hf, tokenizer, transformer
    from pfjax.trainer import health_checks

# Flags belong to the entry point that asks for them, which lists them with --help.
flags.disclaim_key_flags()

_WHY_NOT_FILTERED = (
    ". Training draws from the whole distribution: the objective assumes that every "
    "response can be drawn, and one that cannot is never balanced. For evaluation set "
    "--config.eval_sampling.NAME"
)


def define_config_flag() -> flags.FlagHolder:
    """Declares --config, and --config.NAME for each of its settings."""
    config = config_flags.DEFINE_config_file("config", lock_config=True)
    flags.mark_flag_as_required("config")
    return config


def define_multihost_flag() -> None:
    """Declares --multihost; see `join`."""
    about = "one of several processes, which find each other"
    flags.DEFINE_bool("multihost", False, about)


def join() -> None:
    """Finds the other processes if there should be some, before JAX looks for devices."""
    if flags.FLAGS.multihost:
        distributed.join()
    else:
        distributed.check_alone()


def define_model_flags() -> None:
    """Declares which model, and how it lies on the devices; see `load`."""
    flags.DEFINE_string("model", "pfjax/toy", "Hugging Face folder or hub id")
    flags.DEFINE_enum(
        "dtype", None, ["bfloat16", "float32"], "default: float32 on CPU, else bfloat16"
    )
    flags.DEFINE_integer("tensor", 1, "devices that share each matrix")
    about = 'arguments of the chat template, JSON: {"enable_thinking": false}'
    flags.DEFINE_string("chat_template_kwargs", "", about)
    about = "time that the chat template is told if it asks, ISO 8601; default: now"
    flags.DEFINE_string("clock", "", about)


def define_sampling_flags() -> None:
    """Declares how responses are drawn, in what entry points do not differ in."""
    flags.DEFINE_float("temperature", 1.0, "0 is greedy")
    for field in dataclasses.fields(options.TokenFilters):
        define = flags.DEFINE_integer if field.type is int else flags.DEFINE_float
        define(field.name, field.default, field.metadata["help"])
    flags.DEFINE_integer("seed", 0, "the same seed draws the same")


def token_filters() -> options.TokenFilters:
    """The filters that the flags of sampling give."""
    return options.token_filters(flags.FLAGS.flag_values_dict())


def find_model() -> tuple[os.PathLike, Any]:
    """Where the model of --model lies, and its tokenizer."""
    source = hf.resolve(flags.FLAGS.model)
    how = flags.FLAGS.chat_template_kwargs, flags.FLAGS.clock
    return source, tokenizer.load(source, *how)


@contextlib.contextmanager
def load(source: os.PathLike) -> Iterator["transformer.Policy"]:
    """The model on all devices, whose mesh is set meanwhile."""
    compile_cache.use_cache()
    mesh = sharding.make_mesh(tensor=flags.FLAGS.tensor)
    on_cpu = jax.devices()[0].platform == "cpu"
    dtype = flags.FLAGS.dtype or ("float32" if on_cpu else "bfloat16")
    with jax.set_mesh(mesh):
        yield hf.load(source, mesh, dtype)


def parse(argv: list[str]) -> list[str]:
    """A `flags_parser` for absl; a missing file or misspelt setting ends in one line."""
    # transformers says at import that it has no torch, which nothing here wants.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            flags.FLAGS.config.to_dict()  # one that could not be loaded raises here
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except AttributeError as error:  # ml_collections: repr of a name and a suggestion
        text = str(error)
        text = str(ast.literal_eval(text)) if text[:1] in "'\"" else text
        if "get_config" in text:
            sys.exit("error: --config names a file without a function get_config")
        names = "|".join((*options.FILTER_NAMES, "stop_strings"))
        why = _WHY_NOT_FILTERED if re.match(rf"\W*({names})\b", text) else ""
        sys.exit("error: --config has no setting " + text.replace("\n", ". ") + why)
    except (OSError, ImportError, SyntaxError) as error:
        sys.exit(f"error: --config cannot be read: {error}")
    if len(rest) > 1:
        sys.exit(f"error: unexpected arguments: {rest[1:]}")
    return rest


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """What a person can do something about ends the program with its message and where
    it was found."""
    try:
        yield
    except health_checks.Unhealthy as stop:
        sys.exit(f"error: {stop}")
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        # Kinds of RuntimeError, the compiler's or an unwritten method, are no mistakes
        # of the person's.
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.relpath(frame.filename)}:{frame.lineno}"
        sys.exit(f"error: {error} (raised at {where})")
