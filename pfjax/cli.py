"""What entry points share: flags, help, the model they name, and mistakes as one line."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import math
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
from ml_collections import ConfigDict, config_flags

from pfjax.infra import gpu_memory
from pfjax.sampler import options
from pfjax.trainer import preemption, recipes, settings

with epy.lazy_imports():  # flags are parsed, and --help answers, without them
    import jax

    from pfjax.infra import compile_cache, distributed, sharding
    from pfjax.model import hf, hub, tokenizer, transformer
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
    gpu_memory.set_default()
    _prepare_streams()
    preemption.hear_again()
    with mistakes_in_one_line():
        if {"--help", "-h", "-help", "--helpshort", "--helpfull"} & set(sys.argv):
            print(_help(module))
            return
        rest = _parse(sys.argv)[1:]
        if inspect.signature(main).parameters:
            main(rest)
        elif rest:
            raise ValueError(f"unexpected arguments: {shlex.join(rest)}")
        else:
            main()


def _prepare_streams() -> None:
    """UTF-8 whatever the locale, as JSON has it; and where one is closed, nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(nowhere, "w"))
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def define_config_flag() -> None:
    """Declares --config, and --config.NAME for each setting; see `config`."""
    about = "recipe: a name, or the path of a .py file with get_config()"
    flags.DEFINE_string("config", None, about)


def config() -> ConfigDict:
    """The recipe of --config with what the command line changes of it."""
    return _configs[-1]


_configs: list[ConfigDict] = []  # of the command that runs


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
    flags.DEFINE_integer("tensor", 1, "devices that share each matrix", lower_bound=1)
    about = 'arguments of the chat template, JSON: {"enable_thinking": false}'
    flags.DEFINE_string("chat_template_kwargs", "", about)
    about = "time that the chat template is told if it asks, ISO 8601; default: now"
    flags.DEFINE_string("clock", "", about)


def define_sampling_flags() -> None:
    """Declares how responses are drawn, in what entry points do not differ in."""
    flags.DEFINE_float("temperature", 1.0, "0 is greedy", lower_bound=0.0)
    for field in dataclasses.fields(options.TokenFilters):
        define = flags.DEFINE_integer if field.type is int else flags.DEFINE_float
        define(field.name, field.default, field.metadata["help"])
    flags.DEFINE_integer(
        "seed", 0, "the same seed draws the same", 0, options.LARGEST_SEED
    )


def token_filters() -> options.TokenFilters:
    """The filters that the flags of sampling give."""
    return options.token_filters(flags.FLAGS.flag_values_dict())


def check_sampling_flags() -> None:
    """Raises ValueError for filters or stop strings that are none."""
    token_filters()
    if not all(flags.FLAGS.stop):
        raise ValueError("--stop is empty: every response would end at once")


def most_new_tokens(positions: int, prompts: list[list[int]], default: int) -> int:
    """--max_new_tokens, or the default. Raises ValueError if the model has no positions."""
    longest, given = max(map(len, prompts)), flags.FLAGS.max_new_tokens
    if (room := positions - longest) < 1:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room for a response: the model has "
            f"{positions} positions"
        )
    if given and given > room:
        raise ValueError(
            f"--max_new_tokens={given}: with a prompt of {longest} tokens they exceed the "
            f"model's {positions} positions"
        )
    return given or min(default, room)


def find_model() -> tuple[os.PathLike, Any]:
    """Where the model of --model lies, and its tokenizer."""
    source = hub.resolve(flags.FLAGS.model)
    if flags.FLAGS.multihost and not flags.FLAGS.clock:
        flags.FLAGS.clock = distributed.text_from_first(tokenizer.now())
    how = flags.FLAGS.chat_template_kwargs, flags.FLAGS.clock
    return source, tokenizer.load(source, *how)


def check_alpha(source: os.PathLike, is_given: bool, others: str = "") -> None:
    """Raises ValueError for a policy for every alpha without --alpha, and for --alpha with any
    other model; `others` names what else would take it."""
    path, is_dial = flags.FLAGS.model, (source / hf.DIAL).is_file()
    if is_dial and not is_given:
        raise ValueError(
            f"--model={path} is a policy for every alpha: give --alpha=2, say"
        )
    if is_given and not is_dial:
        raise ValueError(
            f"--alpha needs {others}a policy for every alpha, the folder dial of a run with "
            f"alpha_range; --model={path} is none"
        )


@contextlib.contextmanager
def load(source: os.PathLike) -> Iterator["transformer.Policy"]:
    """The model on all devices, whose mesh is set meanwhile."""
    compile_cache.use_cache()
    mesh = sharding.make_mesh(tensor=flags.FLAGS.tensor)
    on_cpu = jax.devices()[0].platform == "cpu"
    dtype = flags.FLAGS.dtype or ("float32" if on_cpu else "bfloat16")
    with jax.set_mesh(mesh):
        yield hf.load(source, mesh, dtype)


def _parse(argv: list[str]) -> list[str]:
    """Reads the flags and returns what is none; raises ValueError with the way out."""
    takes_config = "config" in flags.FLAGS
    argv, overrides = _split_overrides(argv) if takes_config else (argv, [])
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        hint = _nearest_flag(error.flagname, takes_config)
        raise ValueError(f"there is no flag --{error.flagname}{hint}") from None
    except flags.Error as error:
        raise ValueError(_explain(str(error))) from None
    for flag in _own_flags():
        if flag.default is None and flag.present and flag.value in ("", []):
            raise ValueError(f"--{flag.name} is empty; give --{flag.name}: {flag.help}")
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise ValueError(f"--{flag.name}={flag.value}: must be a finite number")
    if takes_config:
        _configs.append(_load_config(flags.FLAGS.config, overrides))
    return rest


def _split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without those that change a setting, and these."""
    others, overrides = [], []
    rest = iter(argv)
    for arg in rest:
        match = re.match(r"--?(no)?config\.([^=]*)(=?)", arg)
        if not match:
            others.append(arg)
            continue
        is_no, name, has_value = match.groups()
        _check_name(name)
        is_bool = isinstance(settings.SETTINGS[name].default, bool)
        if not has_value and not is_bool:
            value = next(rest, None)
            if value is None or is_no:
                raise ValueError(
                    f"--config.{name} needs a value: --config.{name}=VALUE"
                )
            arg = f"{arg}={value}"
        overrides.append(arg)
    return others, overrides


def _check_name(name: str) -> None:
    """Raises ValueError for a setting that there is not."""
    if name in settings.SETTINGS:
        return
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


def _load_config(recipe: str | None, overrides: list[str]) -> ConfigDict:
    """The config of a recipe with other values."""
    if not recipe:
        names = ", ".join(recipes.recipe_paths())
        raise ValueError(f"give --config=RECIPE, a .py file or one of {names}")
    config = recipes.recipe(recipe)
    values, argv = flags.FlagValues(), ["", *overrides]
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, sys_argv=argv, lock_config=True
    )
    try:
        values(argv)
    except flags.Error as error:
        raise ValueError(_explain(str(error))) from None
    return values.config


def _own_flags() -> list[flags.Flag]:
    """The flags that there are beside absl's own."""
    by_module = flags.FLAGS.flags_by_module_dict().items()
    return [f for module, fs in by_module if not module.startswith("absl") for f in fs]


def _nearest_flag(name: str, takes_config: bool) -> str:
    """A hint at the flag, or the setting, that was meant."""
    near = difflib.get_close_matches(name, [f.name for f in _own_flags()], n=1)
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
    if missing := re.match(r"Missing value for flag -*(\S+)", text):
        return f"--{missing[1]} needs a value"
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


def _help(module: ModuleType) -> str:
    """The docstring of an entry point, its flags, and the settings if it takes any."""
    width = min(shutil.get_terminal_size().columns, 100)
    own = _own_flags()
    shown = [(f"--{f.name}{_default(f.default)}", f.help) for f in own]
    parts = [module.__doc__.strip(), "\nflags:", _columns(shown, width)]
    if any(f.name == "config" for f in own):
        names = textwrap.fill(", ".join(recipes.recipe_paths()), width - 2)
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


_NO_MEMORY = (
    "a device is out of memory. In training set --config.microbatch_size=1, or "
    "--config.rollout_slots to fewer if it was in a rollout (both may change when a run is "
    "continued); in sampling --slots. docs/how-to/memory.md has more, and `pfjax plan` tells "
    "what fits"
)
_NO_DEVICE = (
    "JAX finds no device of JAX_PLATFORMS={}. Unset it, so that JAX takes what there is, or "
    "install what those devices need: `pip install -e '.[cuda13]'`, `'.[cuda12]'` or `'.[tpu]'`"
)


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
    except (
        ValueError,
        FloatingPointError,
        OSError,
        RuntimeError,
        AssertionError,
    ) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        platforms = os.environ.get("JAX_PLATFORMS")
        if platforms and frame.filename.endswith("xla_bridge.py"):
            sys.exit(f"error: {_NO_DEVICE.format(platforms)}\n{error}".rstrip())
        if isinstance(error, AssertionError):
            raise
        if "jax" in sys.modules and distributed.is_loss(error):
            distributed.end_lost(error)
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            sys.exit(f"error: {_NO_MEMORY}\n{str(error).splitlines()[0]}")
        # Kinds of RuntimeError, the compiler's or an unwritten method, are no mistakes
        # of the person's.
        is_kind = isinstance(error, RuntimeError) and type(error) is not RuntimeError
        if is_kind and not isinstance(error, health_checks.Unhealthy):
            raise
        is_known = frame.filename.startswith(_PACKAGE) or isinstance(error, OSError)
        where = f"{os.path.relpath(frame.filename)}:{frame.lineno}"
        sys.exit(f"error: {error}" + ("" if is_known else f" (raised at {where})"))
