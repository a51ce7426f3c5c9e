r"""Trains: python -m pfjax.train --config=configs/smoke.py --workdir=runs/smoke

Any value of the config can be changed: --config.alpha=0.5
"""

import jaxtyping
from absl import app, flags, logging
from ml_collections import config_flags

from pfjax.training import command_line

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    # Shapes in annotations are checked when a function is traced.
    with jaxtyping.install_import_hook("pfjax", "beartype.beartype"):
        import jax

        from pfjax.training import loop

    jax.config.update("jax_numpy_rank_promotion", "raise")
    command_line.use_compilation_cache()
    with command_line.mistakes_in_one_line():
        loop.train_and_evaluate(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parser(_CONFIG))
