r"""What runs changed, on one page: python -m pfjax.report runs/a runs/b --out=report

A RUN is a run's folder, or a folder with runs somewhere below. Runs that differ in the
seed alone are drawn as one, with a band from the least to the greatest. A file
`label.txt` in a run's folder names its group. The page, index.html, needs no network;
its pictures lie beside it as PNG.
"""

import shlex
import sys

from absl import app, flags, logging

_OUT = flags.DEFINE_string("out", "report", "folder to write")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    from pfjax.report import page

    try:
        if len(argv) < 2:
            raise ValueError("give at least one run: a folder that was a --workdir")
        command = f"python -m pfjax.report {shlex.join(sys.argv[1:])}"
        print(page.write(argv[1:], _OUT.value, command))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
