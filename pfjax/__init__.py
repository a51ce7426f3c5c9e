"""PowerFlow in JAX: fine-tuning language models toward their alpha-power distribution.

    policy = pfjax.load("pfjax/toy")
    drawn = pfjax.rollout(policy, ["17+25"], samples_per_prompt=8)
    drawn.texts[0]

    config = pfjax.recipe("smoke", num_steps=30)
    policy = pfjax.fine_tune(config, "runs/smoke", on_step=print)
    pfjax.save(policy, "out", base="pfjax/toy")

    batch = pfjax.pack_rollout(drawn)
    log_pf = pfjax.response_sum(pfjax.log_probs(policy, batch), batch)
    pfjax.losses.powerflow(log_pf, log_p_base, log_z, batch.length, alpha=4.0)

Importing this package starts no back end, changes no environment variable, and
loads what it exports on first use; `pfjax.losses` needs jax alone.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "Policy": "pfjax.model.transformer",
    "at_alpha": "pfjax.model.lora",
    "fine_tune": "pfjax.api",
    "load": "pfjax.api",
    "log_probs": "pfjax.api",
    "losses": None,
    "pack": "pfjax.api",
    "pack_rollout": "pfjax.api",
    "recipe": "pfjax.trainer.recipes",
    "response_sum": "pfjax.packing",
    "rollout": "pfjax.api",
    "save": "pfjax.model.hf",
    "score": "pfjax.model.scoring",
}
__all__ = [
    "Policy",
    "at_alpha",
    "fine_tune",
    "load",
    "log_probs",
    "losses",
    "pack",
    "pack_rollout",
    "recipe",
    "response_sum",
    "rollout",
    "save",
    "score",
]

if TYPE_CHECKING:  # what editors and type checkers see
    from pfjax import losses
    from pfjax.api import fine_tune, load, log_probs, pack, pack_rollout, rollout
    from pfjax.model.hf import save
    from pfjax.model.lora import at_alpha
    from pfjax.model.scoring import score
    from pfjax.model.transformer import Policy
    from pfjax.packing import response_sum
    from pfjax.trainer.recipes import recipe
else:

    def __getattr__(name: str):
        if name not in _EXPORTS:
            raise AttributeError(f"module 'pfjax' has no attribute {name!r}")
        module = _EXPORTS[name]
        if module is None:
            return importlib.import_module(f"pfjax.{name}")
        return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
