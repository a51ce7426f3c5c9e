"""A run's policy as what others load: a model folder with a card, and adapters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from pfjax.infra import storage
from pfjax.model import hf, hf_config, hub, lora, tokenizer, weights
from pfjax.model.transformer import Policy
from pfjax.trainer import checkpoint, run_config, train_fns
from pfjax.trainer.model_card import model_card


def write(
    policy: Policy,
    config: FrozenConfigDict,
    history: list[dict[str, Any]],
    out: epath.Path,
    adapter: epath.Path,
    name: str = "",
) -> None:
    """Writes the model to `out`, and adapters, if the policy has any, to `adapter`.

    Of a policy for every alpha both are of `config.alpha`.

    Args:
      policy: of the run, on all of its processes.
      config: of the run.
      history: rows of `metrics.jsonl`, for the card.
      out, adapter: folders; an old one is replaced.
      name: by which others will load the model; else `out`.
    """
    if policy.config.alpha_range:
        policy = lora.at_alpha(policy, config.alpha)
    if policy.config.lora_rank:
        lora.save_peft(policy, adapter, config.model, config.lora.dropout)
        policy = _beside_stored_base(policy, config.model)
    card = model_card(config, history, name or str(out))
    hf.save(policy, out, base=config.model, card=card)


def check_places(
    config: FrozenConfigDict, out: epath.Path, adapter: epath.Path
) -> None:
    """Raises ValueError if `write` would lose what the run is made from, or files of others."""
    hf.check_replaceable(out, config.model, config.base)
    first = config.lora.init_from
    if first and storage.is_same(adapter, storage.place(first)):
        raise ValueError(
            f"{adapter} is the adapter that this one starts from, which would be lost: "
            "choose another folder"
        )


def load(config: FrozenConfigDict, folder: epath.Path, step: int, mesh: Mesh) -> Policy:
    """The policy of a run at a checkpoint, on any devices. Only reads.

    Raises:
      ValueError: if the checkpoint is damaged, or the base is not the run's.
    """
    source = hub.resolve(config.model)
    tok = tokenizer.load(source, config.data.chat_template_kwargs, config.data.clock)
    base_model = hf_config.read(source)
    model = dataclasses.replace(
        train_fns.policy_model(config, base_model),
        stop_ids=tokenizer.stop_ids(tok, base_model),
        dtype=_widest(source, config.dtype),
    )
    abstract = train_fns.trained_params(model, mesh)
    found = checkpoint.read_policy(folder / "checkpoints", step, abstract)
    trained, identity = found
    if identity[run_config.WEIGHTS] != hub.fingerprint(source):
        raise ValueError(
            f"{config.model} is no longer the model that the run in {folder} started from"
        )
    base = hf.load(source, mesh, model.dtype).params if config.lora.rank else {}
    return Policy(model, lora.join(base, trained))


def _beside_stored_base(policy: Policy, model: str) -> Policy:
    """The adapters beside the base as it is stored, if training rounded it: what was not
    trained is exported as it came."""
    source = hub.resolve(model)
    wide = _widest(source, policy.config.dtype)
    if wide == policy.config.dtype:
        return policy
    base = hf.load(source, jax.sharding.get_mesh(), wide).params
    return policy._replace(params=lora.join(base, lora.select(policy.params)))


def _widest(source: Any, dtype: str) -> str:
    """A type that holds both the stored weights and those of a computation."""
    return str(jnp.promote_types(weights.stored_dtype(source), dtype))
