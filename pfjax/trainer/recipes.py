"""Recipes: configs by name, those that come with pfjax and files of one's own."""

import difflib
import importlib.util
import pathlib
import traceback
from typing import Any

from ml_collections import ConfigDict

from pfjax.trainer import settings


def recipe_paths() -> dict[str, pathlib.Path]:
    """The recipes that come with pfjax, by name."""
    package = pathlib.Path(__file__).parents[1]
    # A wheel has them inside, a checkout beside the package.
    installed = package / "configs"
    folder = installed if installed.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("[a-z]*.py"))}


def recipe_path(name: str) -> str:
    """Where the recipe of a name lies; a path to a file of one's own as it is.

    Either may be followed by a colon and an argument for its `get_config`.

    Raises:
      ValueError: if it is neither a recipe nor a file, with the nearest name.
    """
    head, colon, argument = name.partition(":")
    stem, known = pathlib.PurePath(head).stem, recipe_paths()
    if head in known:
        return f"{known[head]}{colon}{argument}"
    if pathlib.Path(head).is_file():
        return name
    near = difflib.get_close_matches(stem, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"recipes: {', '.join(known)}"
    raise ValueError(f"--config={name}: no such recipe and no such file; {hint}")


def recipe(name: str, **overrides: Any) -> ConfigDict:
    """The config of a recipe, by its name ("smoke") or the path of a file.

    Args:
      name: what `--config=` takes.
      **overrides: settings with other values, by the names that `--config.` takes; a name
        with a dot as in `**{"optim.learning_rate": 1e-4}`.

    Raises:
      ValueError: if there is no such recipe or setting, or a value is of another type.

    >>> config = recipe("smoke", alpha=2, **{"optim.learning_rate": 1e-4})
    >>> config.alpha, config.optim.learning_rate, config.samples_per_prompt
    (2.0, 0.0001, 8)
    """
    config = _recipe(name)
    for key, value in overrides.items():
        if key not in settings.SETTINGS:
            inside = [x for x in settings.SETTINGS if x.startswith(f"{key}.")]
            near = ", ".join(inside) or settings.nearest(key)
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"there is no setting {key!r}{hint}")
        try:
            config.update_from_flattened_dict({key: value})
        except TypeError:
            kind = type(settings.SETTINGS[key].default).__name__
            raise ValueError(f"{key}={value!r}: must be of type {kind}") from None
    return config


def _recipe(name: str) -> ConfigDict:
    path, _, argument = recipe_path(name).partition(":")
    spec = importlib.util.spec_from_file_location("pfjax_recipe", path)
    if spec is None:
        raise ValueError(f"--config={name}: a recipe is a .py file")
    module = importlib.util.module_from_spec(spec)
    config = None
    try:
        spec.loader.exec_module(module)
        if hasattr(module, "get_config"):
            config = module.get_config(*([argument] if argument else []))
    except Exception as error:  # whatever a recipe of one's own may raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        text = " ".join(str(error).split())
        raise ValueError(f"{where}: {type(error).__name__}: {text}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(  # noqa: TRY004
            f"{path}: a recipe needs a function get_config() that returns a ConfigDict"
        )
    try:
        return settings.complete(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
