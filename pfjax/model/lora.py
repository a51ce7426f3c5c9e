"""Low-rank adapters: a small trained part beside a frozen base.

Policy and base share one copy of the weights. An adapter of a projection W adds
`(alpha / rank) A B` to it; B starts at zero, so that training starts at the base.

References:
  Hu et al., arXiv 2106.09685.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
import pathlib
import re
from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pfjax.batch import PackedBatch
from pfjax.infra import storage
from pfjax.model import dial, hf_config, transformer, weights
from pfjax.model.config import ModelConfig
from pfjax.model.families import FAMILIES
from pfjax.model.transformer import Params, Policy
from pfjax.targets import Array

ALL_LINEAR = "all-linear"  # as peft calls them
# Of all families: where Hugging Face's layers have a projection -> its name here.
_MODULES = {
    x.module: name for c in FAMILIES.values() for name, x in c.block.projections.items()
}
# What people know from peft -> our projection.
_TARGETS = {module.rpartition(".")[2]: k for module, k in _MODULES.items()}
# Of peft's files.
_FILES = {"stem": "adapter_model", "prefix": "base_model.model."}
# Fields of adapter_config.json that do not change what the adapters compute, or whose
# effect is in the tensors.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "r", "revision",
    "target_modules", "task_type",
}  # fmt: skip
# How adapters were started that leave the base as it is; PiSSA and others change it.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def projections(targets: str) -> tuple[str, ...]:
    """The projections that "q_proj,v_proj" names; of "all-linear" (), which means all.

    >>> projections("v_proj,q_proj")
    ('wq', 'wv')

    Raises:
      ValueError: for a name that is none, with the nearest.
    """
    names = [name.strip() for name in targets.split(",")]
    if names == [ALL_LINEAR]:
        return ()
    for name in names:
        if name not in _TARGETS:
            near = difflib.get_close_matches(name, _TARGETS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{name!r} is no projection: give some of {','.join(_TARGETS)}, or "
                f"{ALL_LINEAR}{hint}"
            )
    return tuple(k for name, k in _TARGETS.items() if name in names)


def target_names(projections: tuple[str, ...]) -> list[str]:
    """The names that peft has for projections."""
    return [name for name, k in _TARGETS.items() if k in projections]


def select(tree: Params) -> Params:
    """The adapters of a tree of parameters (or of shapes)."""
    names = {f"{name}_{x}" for name in _TARGETS.values() for x in "abs"}
    return {"blocks": {k: x for k, x in tree["blocks"].items() if k in names}}


def join(frozen: Params, trained: Params) -> Params:
    """The parameters of the policy from the frozen and the trained ones."""
    blocks = {**frozen.get("blocks", {}), **trained["blocks"]}
    return {**frozen, **trained, "blocks": blocks}


def init_params(config: ModelConfig, key: Array) -> Params:
    """Adapters for a config with a `lora_rank`: A random, B zero, in float32; scales that
    depend on alpha random too."""
    out = {}
    shapes = select(transformer.abstract_params(config))["blocks"]
    for name, x in sorted(shapes.items()):
        key, used = jax.random.split(key)
        if name.endswith("_s"):
            # Together of variance 1 at one end of the range.
            out[name] = jax.random.normal(used, x.shape) * dial.TERMS**-0.5
            continue
        num_stacked = 1 + len(config.block.projections[name[:-2]].stacked)
        fan_in = math.prod(x.shape[num_stacked:-1])
        draw = jax.random.normal(used, x.shape) * fan_in**-0.5
        out[name] = draw if name.endswith("_a") else jnp.zeros(x.shape)
    return {"blocks": out}


def dropout(config: ModelConfig, batch: PackedBatch, rate: float) -> transformer.Thin:
    """Drops a fraction `rate` of what adapters read, and scales up what stays.

    What is dropped depends on the seed of a trajectory and on the place in it, layer and
    projection: not on how trajectories are packed, nor on the mesh.

    The loss then sees another policy for each seed, thinned, of which none has sampled.
    The mean of log pi over them is below log pi of the whole one, by more for a longer
    response, and its variance enters the squared residual: the policy that is sampled and
    exported ends near its target, no longer at it. Ratios are 1 on policy, by definition.

    References:
      Hu et al., arXiv 2106.09685; `lora_dropout` of peft.
    """
    segment = jnp.maximum(batch.segment_ids - 1, 0)
    seeds = jnp.take_along_axis(batch.dropout_seed, segment, axis=1)
    each = lambda f: jax.vmap(jax.vmap(f))
    # Threefry, whose numbers do not depend on which device computes them.
    key = functools.partial(jax.random.key, impl="threefry2x32")
    of_token = each(lambda s, p: jax.random.fold_in(key(s), p))(seeds, batch.positions)

    names = list(config.block.projections)

    def thin(y: Array, layer: Array, name: str) -> Array:
        number = layer * len(names) + names.index(name)
        draw = lambda k: jax.random.bernoulli(
            jax.random.fold_in(k, number), 1 - rate, y.shape[2:]
        )
        return jnp.where(each(draw)(of_token), y / (1 - rate), 0)

    return thin


def at_alpha(policy: Policy, alpha: Real) -> Policy:
    """Takes a policy trained for every alpha of a range at one of them.

    Args:
      policy: of a run with `alpha_range`; `pfjax.load("runs/x/dial")` loads one.
      alpha: at 1 it is the base.

    Returns:
      A policy with ordinary adapters, for `rollout`, `log_probs` and `score`, the scales in
      their B; `pfjax export --alpha` writes one.

    Raises:
      ValueError: for another policy, or an alpha outside of the range.
    """
    config, params = policy
    if not config.alpha_range:
        raise ValueError(
            "the policy was not trained for every alpha (alpha_range): there is none to choose"
        )
    low, high = config.alpha_range
    if not low <= alpha <= high:
        raise ValueError(
            f"alpha={alpha:g}: the policy is for {low:g} to {high:g}, where it was trained"
        )
    blocks = dict(params["blocks"])
    x = dial.features(config.alpha_range, jnp.float32(alpha))
    for name in config.adapted:
        if f"{name}_s" not in blocks:  # no layer is of its type
            continue
        coefficients, b = blocks.pop(f"{name}_s"), blocks[f"{name}_b"]
        scales = jnp.einsum("p,lpr->lr", x, coefficients, precision="highest")
        blocks[f"{name}_b"] = b * scales.reshape(*scales.shape, *(1,) * (b.ndim - 2))
    config = dataclasses.replace(config, alpha_range=())
    return Policy(config, {**params, "blocks": blocks})


def merge(policy: Policy) -> Policy:
    """The same policy without adapters: they are added to the weights, in float32.

    Raises:
      ValueError: for a policy for every alpha, of which no weights are those of all.
    """
    config, params = policy
    if not config.lora_rank:
        return policy
    _check_at_one(config)
    scale = config.lora_alpha / config.lora_rank
    blocks = dict(params["blocks"])
    for name in config.adapted:
        if name not in blocks:  # no layer is of its type
            continue
        projection = config.block.projections[name]
        l, (read, written, *_) = f"l{projection.stacked}", projection
        a, b = (blocks.pop(f"{name}_{x}") for x in "ab")
        shapes = f"{l}{read}r,{l}r{written}->{l}{read}{written}"
        delta = scale * jnp.einsum(shapes, a, b, precision="highest")
        blocks[name] = blocks[name].astype(jnp.float32) + delta
    none = {"lora_rank": 0, "lora_alpha": 0.0, "lora_targets": ()}
    config = dataclasses.replace(config, **none)
    return Policy(config, {**params, "blocks": blocks})


def _check_at_one(config: ModelConfig) -> None:
    if config.alpha_range:
        raise ValueError(
            "the policy is one for every alpha: take it at one first, "
            "pfjax.at_alpha(policy, 2.0)"
        )


class Adapter(NamedTuple):
    """Adapters in a folder of peft's format, and what their config says."""

    folder: pathlib.Path
    rank: int
    alpha: float
    targets: tuple[str, ...]  # projections
    base: str  # the model that they were made for


def read_peft(folder: pathlib.Path) -> Adapter:
    """What a folder that peft, or `save_peft`, wrote holds; without the values.

    Raises:
      ValueError: if it is damaged, or not plain LoRA on projections.
    """
    path = folder / "adapter_config.json"
    c = hf_config.read_object(path)
    plain = {"peft_type": "LORA", "bias": "none"}
    other = {k: c.get(k) for k, value in plain.items() if c.get(k, value) != value}
    other |= {k: x for k, x in c.items() if x and k not in _INERT | plain.keys()}
    if c.get("init_lora_weights") in (None, *_STARTS):
        other.pop("init_lora_weights", None)
    if other:
        shown = ", ".join(f"{k}={x!r}" for k, x in other.items())
        raise ValueError(
            f"{path} sets {shown}: only plain LoRA on projections is supported; merge "
            "the adapter into its base with peft, and train from that model"
        )
    # Of the tensors, as the config's may be a pattern.
    of_layer = re.compile(r"model\.layers\.\d+\.(.+)\.lora_[AB]\.weight")
    found = {x: of_layer.fullmatch(x) for x in weights.names(folder, **_FILES)}
    of_expert = re.compile(r"\.\d+\.")
    modules = {of_expert.sub(".*.", match[1]) for match in found.values() if match}
    unknown = sorted(modules - _MODULES.keys())
    unknown += [name for name, match in found.items() if not match]
    rank, alpha = c.get("r"), c.get("lora_alpha")
    are_numbers = type(rank) is int and rank > 0 and type(alpha) in (int, float)
    if unknown or not modules or not are_numbers:
        raise ValueError(
            f"{folder} holds more or less than adapters of {', '.join(_TARGETS)}: rank "
            f"{rank!r}, alpha {alpha!r}, {unknown[:3] or f'{len(found)} tensors'}"
        )
    found = {_MODULES[x] for x in modules}
    targets = tuple(k for k in _TARGETS.values() if k in found)
    base = c.get("base_model_name_or_path") or ""
    return Adapter(folder, rank, float(alpha), targets, base)


def is_for(adapter: Adapter, model: str) -> bool:
    """Whether adapters may have been made for a model, a folder or hub id, by its name."""
    name = lambda x: x.partition("@")[0].rstrip("/").rpartition("/")[2].lower()
    return not adapter.base or name(adapter.base) == name(model)


def load_peft(adapter: Adapter, config: ModelConfig, where: Params) -> Params:
    """The values, in float32, onto the shardings `where`.

    Raises:
      ValueError: if they are not exactly those of the config's adapters.
    """
    abstract = select(transformer.abstract_params(config))
    dtype = jnp.dtype("float32")
    return weights.load(adapter.folder, config, abstract, where, dtype, **_FILES)


def save_peft(
    policy: Policy, out_dir: str | os.PathLike, base: str, dropout: float = 0.0
) -> None:
    """Writes the adapters as a folder that `peft` loads onto `base`; `dropout` is what
    they were trained with."""
    config = policy.config
    _check_at_one(config)
    name, _, revision = base.partition("@")
    if not revision or storage.exists(base):
        name, revision = base, None
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": target_names(config.adapted),
        "inference_mode": True,
    }
    with storage.local_folder(out_dir) as out:
        trained, dtype = select(policy.params), jnp.dtype("float32")
        weights.write_tensors(config, trained, out, dtype, **_FILES)
        if jax.process_index() == 0:
            text = json.dumps(adapter, indent=2) + "\n"
            (out / "adapter_config.json").write_text(text, "utf-8")
