r"""Trains: python -m pfjax.train --config=configs/smoke.py --workdir=runs/smoke

Any value of the config can be changed: --config.alpha=0.5
"""

import os
import sys
import traceback

import jaxtyping
from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
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
        print(
            f"error: {error}\n(raised at {os.path.relpath(frame.filename)}:"
            f"{frame.lineno})",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
