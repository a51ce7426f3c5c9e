"""What entry points share: flags, help, the model they name, and mistakes as one line."""

import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import shlex
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from absl import flags
from etils import epy
from ml_collections import config_flags

from pfjax.sampler import options
from pfjax.trainer import settings

with epy.lazy_imports():  # flags are parsed, and --help answers, without them
    import jax

    from pfjax.infra import compile_cache, distributed, sharding
    from pfjax.model import hf, tokenizer, transformer
    from pfjax.trainer import health_checks

# Flags belong to the entry point that asks for them, which lists them with --help.
flags.disclaim_key_flags()

_WHY_NOT_FILTERED = (
    "Training draws from the whole distribution: the objective assumes that every "
    "response can be drawn, and one that cannot is never balanced. For evaluation set "
)


def run(main: Callable[..., None]) -> None:
    """Runs an entry point: reads its flags, then calls `main` with what is left over.

    `--help` prints the docstring of its module, its flags, and the settings if it has
    `--config`. A mistake ends the program with one line and status 1.

    Args:
      main: function of a module that has defined its flags; called with the arguments
        that are none, if it takes them.
    """
    module = sys.modules[main.__module__]
    # transformers says at import that it has no torch, which nothing here wants.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with mistakes_in_one_line():
        if "config" in flags.FLAGS:
            sys.argv = _with_config_first(sys.argv)
        if {"--help", "-h", "-help", "--helpshort", "--helpfull"} & set(sys.argv):
            print(_help(module))
            return
        rest = _parse(module, sys.argv)[1:]
        if inspect.signature(main).parameters:
            main(rest)
        elif rest:
            raise ValueError(f"unexpected arguments: {shlex.join(rest)}")
        else:
            main()


def define_config_flag() -> flags.FlagHolder:
    """Declares --config, and --config.NAME for each of its settings."""
    about = "recipe: a name, or the path of a .py file with get_config()"
    return config_flags.DEFINE_config_file("config", help_string=about)


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


def _with_config_first(argv: list[str]) -> list[str]:
    """The arguments with the recipe of --config as a path, before what overrides it."""
    program, *rest = argv
    found, others = [], []
    while rest:
        arg, *rest = rest
        name, equals, value = arg.lstrip("-").partition("=")
        if arg[:1] != "-" or name != "config":
            others.append(arg)
        elif equals or rest:
            value = value if equals else rest.pop(0)
            found = [f"--config={settings.recipe_path(value)}"]
        else:
            raise ValueError(
                f"--config needs a recipe: {', '.join(settings.recipes())}"
            )
    return [program, *found, *others]


def _parse(module: ModuleType, argv: list[str]) -> list[str]:
    """Reads the flags; raises ValueError with the way out for what cannot be read."""
    takes_config = "config" in flags.FLAGS
    if takes_config:
        if not any(x.startswith("--config=") for x in argv[1:2]):
            names = ", ".join(settings.recipes())
            raise ValueError(f"give --config=RECIPE, a .py file or one of {names}")
        _check_names(argv)
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        hint = _nearest_flag(error.flagname, module, takes_config)
        raise ValueError(f"there is no flag --{error.flagname}{hint}") from None
    except flags.Error as error:
        raise ValueError(_explain(str(error))) from None
    if takes_config:
        try:
            flags.FLAGS.config.to_dict()  # one that could not be loaded raises here
        except Exception as error:  # whatever a recipe of one's own may raise
            raise ValueError(_explain_recipe(error)) from error
    return rest


def _check_names(argv: list[str]) -> None:
    """Raises ValueError for a setting that there is not."""
    for arg in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]*)", arg)
        if not match or match[1] in settings.SETTINGS:
            continue
        name = match[1]
        if inside := [x for x in settings.SETTINGS if x.startswith(f"{name}.")]:
            shown = ", ".join(f"--config.{x}" for x in inside)
            raise ValueError(f"--config.{name} is a group; its settings: {shown}")
        last = name.rpartition(".")[2]
        if last in (*options.FILTER_NAMES, "stop_strings"):
            raise ValueError(
                f"there is no setting --config.{name}. {_WHY_NOT_FILTERED}"
                f"--config.eval_sampling.{last}"
            )
        near = settings.nearest(name)
        hint = f"; did you mean --config.{near}?" if near else ""
        raise ValueError(f"there is no setting --config.{name}{hint}")


def _nearest_flag(name: str, module: ModuleType, takes_config: bool) -> str:
    """A hint at the flag, or the setting, that was meant."""
    own = [f.name for f in flags.FLAGS.get_key_flags_for_module(module)]
    near = difflib.get_close_matches(name, own, n=1)
    if takes_config and (setting := settings.nearest(name)):
        near = near or [f"config.{setting}"]
    return f"; did you mean --{near[0]}?" if near else " (--help lists them)"


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a tuple, as in '(10, 13)'",
}


def _explain(text: str) -> str:
    """Absl's words for a value that is missing or of the wrong type, in ours."""
    if missing := re.findall(r"Flag --(\w+) must have a value", text):
        flag = flags.FLAGS[missing[0]]
        return f"give --{flag.name}: {flag.help}"
    if match := re.match(r"flag --([\w.]+)=(.*?): ", text, re.DOTALL):
        name, value = match.groups()
        if name.startswith("config."):
            kind = type(settings.SETTINGS[name.removeprefix("config.")].default)
        else:
            kind = {"int": int, "float": float, "bool": bool}.get(
                flags.FLAGS[name].flag_type()
            )
        if kind in _KINDS and not _is_a(kind, value):
            return f"--{name}={value}: must be {_KINDS[kind]}"
        return f"--{name}={value}: {text[match.end() :]}"
    return text


def _is_a(kind: type, text: str) -> bool:
    """Whether a text is a number of a kind."""
    try:
        kind(text)
    except ValueError:
        return False
    return kind in (int, float)


def _explain_recipe(error: Exception) -> str:
    """What keeps a recipe from being loaded, and where in it."""
    path = sys.argv[1].partition("=")[2].partition(":")[0]
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if f.filename == path]
    where = f"{path}:{lines[-1]}" if lines else path
    text = " ".join(str(error).split())
    if "get_config" in text:
        return f"{where}: a recipe needs a function get_config() that returns a config"
    return f"{where}: {type(error).__name__}: {text}"


def _help(module: ModuleType) -> str:
    """The docstring of an entry point, its flags, and the settings if it takes any."""
    width = min(shutil.get_terminal_size().columns, 100)
    own = {f.name: f for f in flags.FLAGS.get_key_flags_for_module(module)}
    config = own.pop("config", None)
    shown = [(f"--{n}{_default(f.default)}", f.help) for n, f in own.items()]
    if config is not None:
        shown.insert(0, ("--config", config.help))
    parts = [module.__doc__.strip(), "\nflags:", _columns(shown, width)]
    if config is not None:
        names = textwrap.fill(", ".join(settings.recipes()), width - 2)
        parts += ["\nrecipes:", textwrap.indent(names, "  ")]
        parts += ["\nsettings, each as --config.NAME=VALUE:"]
        shown = []
        for name, setting in settings.SETTINGS.items():
            choices = setting.choices if isinstance(setting.choices, tuple) else ()
            about = setting.about + (f" ({' | '.join(choices)})" if choices else "")
            shown.append((name + _default(setting.default), about))
        parts.append(_columns(shown, width))
    return "\n".join(parts)


def _default(value: Any) -> str:
    is_nothing = value is None or value is False or value in ("", [], ())
    return "" if is_nothing else f"={value}"


def _columns(rows: Iterable[tuple[str, str]], width: int) -> str:
    """Rows of a name and what it means, which begins in one column."""
    lines = []
    for name, about in rows:
        gap = "\n" + " " * 32 if len(name) > 28 else " " * (30 - len(name))
        wrapped = textwrap.wrap(" ".join(about.split()), max(width - 32, 20)) or [""]
        lines.append(f"  {name}{gap}" + ("\n" + " " * 32).join(wrapped))
    return "\n".join(lines)


_PACKAGE = os.path.dirname(__file__)


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Ends the program with the message of what a person can do something about.

    A ValueError or RuntimeError that a library raises is said with its place.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        # Kinds of RuntimeError, the compiler's or an unwritten method, are no mistakes
        # of the person's.
        is_kind = isinstance(error, RuntimeError) and type(error) is not RuntimeError
        if is_kind and not isinstance(error, health_checks.Unhealthy):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        is_known = frame.filename.startswith(_PACKAGE) or isinstance(error, OSError)
        where = f"{os.path.relpath(frame.filename)}:{frame.lineno}"
        sys.exit(f"error: {error}" + ("" if is_known else f" (raised at {where})"))
