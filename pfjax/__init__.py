"""PowerFlow in JAX: fine-tuning language models toward their alpha-power distribution.

    policy = pfjax.load("pfjax/toy")
    logps = pfjax.score(policy, sequences, prompt_lengths)
    rollout = pfjax.rollout(policy, prompts, samples_per_prompt=8)
    pfjax.save(policy, "out")
    pfjax.losses.powerflow(log_pf, log_p_base, log_z, length, alpha=4.0)

Importing this package starts no back end, changes no environment variable, and
loads what it exports on first use; `pfjax.losses` needs jax alone.
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "Policy": "pfjax.model.transformer",
    "load": "pfjax.model.hf",
    "losses": None,
    "rollout": "pfjax.sampler.engine",
    "save": "pfjax.model.hf",
    "score": "pfjax.model.log_probs",
}
__all__ = ["Policy", "load", "losses", "rollout", "save", "score"]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pfjax' has no attribute {name!r}")
    module = _EXPORTS[name]
    if module is None:
        return importlib.import_module(f"pfjax.{name}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
