"""Options of sampling, declared once: flags, settings and records are made of them.

Needs nothing but Python, as command lines are parsed before jax is configured.
"""

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

LARGEST_SEED = 2**32 - 1  # JAX draws the same with a seed and with 2^32 more


def _option(default: Any, explained: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": explained})


@dataclasses.dataclass(frozen=True)
class TokenFilters:
    """Which tokens may be drawn, for evaluation only: they are applied in this order to
    the logits divided by the temperature.

    References:
      top-p: Holtzman et al., arXiv 1904.09751; min-p: Nguyen et al., arXiv 2407.01082.
    """

    top_k: int = _option(0, "keep the k most likely tokens; 0 for all")
    top_p: float = _option(
        1.0, "keep the fewest most likely tokens of at least this mass"
    )
    min_p: float = _option(
        0.0, "keep tokens at least this likely relative to the likeliest"
    )

    def __post_init__(self):
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p must be in [0, 1), got {self.min_p}")


def check_whole(name: str, value: Any, least: int, most: float = math.inf) -> None:
    """Raises ValueError unless a value is a whole number from `least` to `most`."""
    with contextlib.suppress(TypeError):
        if least <= operator.index(value) <= most:
            return
    end = "on" if most == math.inf else f"to {most}"
    said = f"{name}={value!r:.100}: must be a whole number from {least} {end}"
    raise ValueError(said)


NO_FILTERS = TokenFilters()
FILTER_NAMES = tuple(f.name for f in dataclasses.fields(TokenFilters))


def token_filters(values: Mapping[str, Any]) -> TokenFilters:
    """The filters among other values: of flags, or of a config as a dictionary."""
    return TokenFilters(**{name: values[name] for name in FILTER_NAMES})


@dataclasses.dataclass(frozen=True)
class StopConditions:
    """Where responses end, besides at `max_new_tokens`."""

    stop_ids: tuple[int, ...] | None = None  # tokens that end one; None: the config's
    # A response ends with the token that completes one of these in its text (not for
    # training: no token then stands for the decision to stop).
    stop_strings: tuple[str, ...] = ()
    decode_text: Callable[[list[int]], str] | None = None  # needed with stop_strings
    # Of all responses together: each is cut at the largest common length that keeps
    # within it.
    max_total_tokens: int | None = None

    def __post_init__(self):
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(
                f"stop_strings must be a tuple of texts that are not empty, got "
                f"{self.stop_strings!r}"
            )
        if self.stop_ids is not None:
            # Hashable: programs are compiled for them.
            object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        if self.stop_strings and self.decode_text is None:
            raise ValueError(
                "stop_strings need decode_text, which makes text of tokens"
            )


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What a rollout takes of the devices, which changes no sample. None: chosen by
    `slots.make_plan` from the prompts, the memory and the platform."""

    prompt_width: int | None = None  # so that other prompts share compiled programs
    num_slots: int | None = None  # samples decoded at once, over all devices
    # Of keys and values: bfloat16 on accelerators, else the type of the computation.
    cache_dtype: str | None = None
    backend: str | None = None  # one of `decode_attention.BACKENDS`


NO_STOP, ANY_CAPACITY = StopConditions(), Capacity()
