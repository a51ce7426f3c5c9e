"""Families of models, a file each: what only its models have."""

import importlib
import pkgutil

from pfjax.model.config import ModelConfig

# `model_type` of config.json -> config of the family.
FAMILIES: dict[str, type[ModelConfig]] = {
    family.model_type: family
    for module in pkgutil.iter_modules(__path__, f"{__name__}.")
    for family in (importlib.import_module(module.name).Config,)
}
