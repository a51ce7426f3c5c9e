r"""Trains: python -m pfjax.train --config=configs/smoke.py --workdir=runs/smoke

Any value of the config can be changed: --config.alpha=0.5. With --multihost this is one
of several processes. Exit status 75: told to stop, has saved; the same command continues.
"""

import sys

import jaxtyping
from absl import app, flags, logging

from pfjax import cli

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
cli.define_multihost_flag()


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    # Shapes in annotations are checked when a function is traced.
    with jaxtyping.install_import_hook("pfjax", "beartype.beartype"):
        import jax

        from pfjax.infra import compile_cache
        from pfjax.trainer import loop, preemption

    jax.config.update("jax_numpy_rank_promotion", "raise")
    compile_cache.use_cache()
    with cli.mistakes_in_one_line():
        cli.join()
        try:
            loop.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
        except preemption.Preempted as stop:
            print(stop, file=sys.stderr)
            sys.exit(preemption.EXIT_STATUS)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)
