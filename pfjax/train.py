r"""Fine-tunes a model: pfjax train --config=smoke --workdir=runs/smoke

Any setting of the recipe can be changed: --config.alpha=0.5. The same command continues a
run that was stopped; exit status 75 means that it was told to stop, and has saved.
`python -m pfjax.train` does the same.
"""

import sys

from absl import flags, logging

from pfjax import cli

cli.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
cli.define_multihost_flag()


def main() -> None:
    logging.set_verbosity(logging.WARNING)
    import jaxtyping

    # Shapes in annotations are checked when a function is traced.
    with jaxtyping.install_import_hook("pfjax", "beartype.beartype"):
        import jax

        from pfjax.infra import compile_cache
        from pfjax.trainer import loop, preemption

    jax.config.update("jax_numpy_rank_promotion", "raise")
    compile_cache.use_cache()
    cli.join()
    try:
        loop.train_and_evaluate(cli.config(), _WORKDIR.value)
    except preemption.Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(preemption.EXIT_STATUS)


if __name__ == "__main__":
    cli.run(main)
