"""What the doors that read a config share: flags, and mistakes as one line."""

import ast
import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator

from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
flags.mark_flag_as_required("config")

_WHY_NOT_TRUNCATED = (
    ". Training draws from the whole distribution: the objective assumes that every "
    "response can be drawn, and one that cannot is never balanced. For evaluation set "
    "--config.eval_sampling.NAME"
)


def parse(argv: list[str]) -> list[str]:
    """A `flags_parser` for absl; a missing file or misspelt setting ends in one line."""
    # transformers says at import that it has no torch, which nothing here wants.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        rest = flags.FLAGS(argv)
        CONFIG.value.to_dict()  # a config that could not be loaded raises here
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except AttributeError as error:  # ml_collections: repr of a name and a suggestion
        text = str(error)
        text = str(ast.literal_eval(text)) if text[:1] in "'\"" else text
        if "get_config" in text:
            sys.exit("error: --config names a file without a function get_config")
        is_truncation = re.match(r"\W*(top_k|top_p|min_p|stop_strings)\b", text)
        text = text.replace("\n", ". ") + (_WHY_NOT_TRUNCATED if is_truncation else "")
        sys.exit("error: --config has no setting " + text)
    except (OSError, ImportError, SyntaxError) as error:
        sys.exit(f"error: --config cannot be read: {error}")
    if len(rest) > 1:
        sys.exit(f"error: unexpected arguments: {rest[1:]}")
    return rest


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """What a person can do something about ends the program with its message and where
    it was found."""
    from pfjax.trainer import health_checks

    try:
        yield
    except health_checks.Unhealthy as stop:
        sys.exit(f"error: {stop}")
    except (ValueError, FloatingPointError, OSError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.relpath(frame.filename)}:{frame.lineno}"
        sys.exit(f"error: {error}\n(raised at {where})")
