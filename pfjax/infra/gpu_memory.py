"""How much of a GPU's memory a run takes: JAX reserves it when it starts."""

import os

# JAX's own default is 75 %. What is left is for the driver, for NCCL and for cuDNN.
FRACTION = 0.92
# JAX reads either, and refuses both.
_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def set_default() -> None:
    """Has JAX reserve `FRACTION`, unless the environment says how much.

    To be called before the back end starts. Only commands do: what imports pfjax decides
    for itself.
    """
    if _said() is None:
        os.environ[_VARIABLES[0]] = str(FRACTION)


def fraction() -> float:
    """What a run that is started with this environment reserves."""
    said = _said()
    return FRACTION if said is None else float(said)


def _said() -> str | None:
    return next(filter(None, map(os.environ.get, _VARIABLES)), None)
