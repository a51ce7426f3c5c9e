"""The defaults that recipes start from; `pfjax/trainer/settings.py` declares them."""

import ml_collections

from pfjax.trainer import settings


def get_config() -> ml_collections.ConfigDict:
    return settings.default_config()
