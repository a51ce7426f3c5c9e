r"""Shows what runs changed, on one page: pfjax report runs/a runs/b --out=report

A RUN is a run's folder, or a folder with runs somewhere below; the first is the headline.
Runs that differ in the seed alone are drawn as one, with a band from the least to the
greatest. A file `label.txt` in a run's folder names its group. The page, index.html,
needs no network. --watch serves it instead, and shows what is new while runs train.
"""

import shlex
import sys

from absl import flags, logging

from pfjax import cli

_OUT = flags.DEFINE_string("out", "report", "folder to write")
_WATCH = flags.DEFINE_bool("watch", False, "serve the page on this machine instead")
_PORT = flags.DEFINE_integer("port", 8008, "of --watch; 0: any that is free", 0, 65535)


def main(runs: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    from pfjax.report import page, serve

    if not runs:
        raise ValueError("give at least one run: a folder that was a --workdir")
    command = f"pfjax report {shlex.join(sys.argv[1:])}"
    if not _WATCH.value:
        print(page.write(runs, _OUT.value, command))
        return
    try:
        server = serve.make_server(runs, _PORT.value, command)
    except OSError as error:
        raise ValueError(
            f"--port={_PORT.value}: {error.strerror}; --port=0 takes any that is free"
        ) from error
    with server:
        print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    cli.run(main)
