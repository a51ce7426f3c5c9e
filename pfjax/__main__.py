"""The command `pfjax`, also as `python -m pfjax`: one word chooses what is done."""

import importlib
import sys

# Loaded when they are asked for: the list of them appears at once.
COMMANDS = {
    "train": ("pfjax.train", "fine-tune a model toward its power distribution"),
    "sample": ("pfjax.sample", "draw responses from a model, as JSON lines"),
    "evaluate": ("pfjax.evaluate", "score a model on benchmarks"),
    "report": ("pfjax.report.__main__", "show what runs changed, on one page"),
    "plan": ("pfjax.plan", "tell the memory and time a run takes, without devices"),
    "export": ("pfjax.export", "make a Hugging Face model of a run's checkpoint"),
}


def main() -> None:
    """Runs the command that the first argument names, with the rest of them."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(_usage())
        return
    if name == "--version":
        import pfjax

        print(f"pfjax {pfjax.__version__}")
        return
    if name not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        sys.exit(f"error: no command {name!r}{hint} (pfjax --help lists them)")
    sys.argv = [f"pfjax {name}", *rest]
    module = importlib.import_module(COMMANDS[name][0])
    from pfjax import cli

    cli.run(module.main)


def _usage() -> str:
    lines = [f"  pfjax {name:<10}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "PowerFlow in JAX: language models toward their alpha-power distribution\n",
            *lines,
            "\nA first run, one to three minutes on a laptop:",
            "  pfjax train --config=smoke --workdir=runs/smoke",
            "\npfjax COMMAND --help lists what a command takes.",
        ]
    )


if __name__ == "__main__":
    main()
