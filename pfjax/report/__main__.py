r"""Shows what runs changed, on one page: pfjax report runs/a runs/b --out=report

A RUN is a run's folder, or a folder with runs somewhere below. Runs that differ in the
seed alone are drawn as one, with a band from the least to the greatest. A file
`label.txt` in a run's folder names its group. The page, index.html, needs no network;
its pictures lie beside it as PNG.
"""

import shlex
import sys

from absl import flags, logging

from pfjax import cli

_OUT = flags.DEFINE_string("out", "report", "folder to write")


def main(runs: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    from pfjax.report import page

    if not runs:
        raise ValueError("give at least one run: a folder that was a --workdir")
    command = f"pfjax report {shlex.join(sys.argv[1:])}"
    print(page.write(runs, _OUT.value, command))


if __name__ == "__main__":
    cli.run(main)
