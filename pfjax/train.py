r"""Trains: python -m pfjax.train --config=configs/smoke.py --workdir=runs/smoke

Any value of the config can be changed: --config.alpha=0.5
"""

import ast
import os
import re
import sys
import traceback

import jaxtyping
from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
flags.mark_flag_as_required("config")

_WHY_NOT_TRUNCATED = (
    ". Training draws from the whole distribution: the objective assumes that every "
    "response can be drawn, and one that cannot is never balanced. For evaluation set "
    "--config.eval_sampling.NAME"
)


def parse(argv: list[str]) -> list[str]:
    """Parses flags; a file that is not there or a misspelt setting is one line."""
    # transformers says at import that it has no torch, which nothing here wants.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        rest = flags.FLAGS(argv)
        _CONFIG.value.to_dict()  # a config that could not be loaded raises here
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
    return rest


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    # Shapes in annotations are checked when a function is traced.
    with jaxtyping.install_import_hook("pfjax", "beartype.beartype"):
        import jax

        from pfjax.training import loop

    jax.config.update("jax_numpy_rank_promotion", "raise")
    try:
        loop.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    except (ValueError, FloatingPointError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.relpath(frame.filename)}:{frame.lineno}"
        sys.exit(f"error: {error}\n(raised at {where})")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
