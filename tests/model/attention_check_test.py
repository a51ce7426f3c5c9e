"""The check before training: what it lets pass, and faults that it must see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pfjax.infra import sharding
from pfjax.model import attention, attention_check
from pfjax.model.chunked_attention import attend
from tests.model import cudnn_emulation

MAX_SEGMENTS = 17
HERE = jax.devices()[0].device_kind
INDEX = np.arange(attention_check._LENGTH)[None]


@pytest.fixture
def check(tiny_config, monkeypatch):
    """The check on one device, of a back end by name or of a function in its place."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def run(backend, dtype="float32", windows=(0,)):
        if callable(backend):
            monkeypatch.setitem(attention._BACKENDS, "splash_interpret", backend)
            backend = "splash_interpret"
        config = dataclasses.replace(
            tiny_config, attention=backend, dtype=dtype, head_dim=64
        )
        attention_check.check(config, mesh, MAX_SEGMENTS, windows)

    return run


def test_passes_attention_that_is_correct(check, monkeypatch):
    cudnn_emulation.install(monkeypatch)
    check("cudnn", "bfloat16", (0, 4096))


@pytest.mark.slow
def test_rows_that_devices_share_are_long_enough_to_be_split(tiny_config):
    config = dataclasses.replace(tiny_config, attention="splash_interpret", head_dim=64)
    mesh = sharding.make_mesh(fsdp=2, context=4)
    attention_check.check(config, mesh, MAX_SEGMENTS)


def test_compares_prefills_where_rows_are_not_shared(tiny_config, monkeypatch):
    """GPUs that share rows in updates run another kernel in rollouts."""
    monkeypatch.setattr(sharding, "platform", lambda: ("gpu", "NVIDIA L40S"))
    wrong = lambda q, k, v, ids: jnp.nan * attend(q, k, v, ids)
    monkeypatch.setitem(attention._BACKENDS, "triton", wrong)
    config = dataclasses.replace(tiny_config, head_dim=64)
    mesh = sharding.make_mesh(context=2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert attention.chosen("auto", 64, "float32") == "chunked"
    with pytest.raises(RuntimeError, match="triton attention is wrong"):
        attention_check.check(config, mesh, MAX_SEGMENTS)


@pytest.mark.parametrize("window, seen", [(7, 8), (4096, 19)])
def test_refuses_a_window_that_is_another(check, window, seen):
    """By one token, and however wide the layers have it."""
    wrong = lambda *args, window: attend(*args, window=seen)
    size = min(window, 20)
    with pytest.raises(RuntimeError, match=f"with a window of {size} tokens is wrong"):
        check(wrong, windows=(window,))


def test_refuses_segments_that_shift_from_row_to_row(check, monkeypatch):
    cudnn_emulation.install(monkeypatch)
    starts = attention.segment_extents

    def starts_and_last_end(segment_ids, max_segments):
        length, offset = starts(segment_ids, max_segments)
        end = jnp.where(length > 0, offset[:, :-1] + length, -1)
        return length, jnp.concatenate([offset[:, :1], end], axis=1)

    monkeypatch.setattr(attention, "segment_extents", starts_and_last_end)
    with pytest.raises(RuntimeError, match=f"cudnn attention is wrong on {HERE}"):
        check("cudnn", "bfloat16")


def _not_implemented(q, k, v, ids):
    raise NotImplementedError("not on this card")


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda q, k, v, ids: jnp.nan * attend(q, k, v, ids), "its output is off"),
        # A second row with the segments of the first.
        (
            lambda q, k, v, ids: attend(q, k, v, jnp.broadcast_to(ids[:1], ids.shape)),
            "its output is off",
        ),
        # No gradient beyond a few segments.
        (
            lambda q, k, v, ids: attend(
                q,
                jnp.where((ids > 8)[..., None, None], jax.lax.stop_gradient(k), k),
                v,
                ids,
            ),
            "its d/dk is off",
        ),
        # Long segments in two.
        (
            lambda q, k, v, ids: attend(q, k, v, ids + 99 * (INDEX > 300)),
            "its output is off",
        ),
        (_not_implemented, f"splash_interpret attention does not run on {HERE}"),
    ],
)
def test_refuses_what_is_wrong_in_part(check, wrong, message):
    with pytest.raises(RuntimeError, match=message):
        check(wrong)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="has a compiler for it")
def test_a_kernel_of_another_platform_is_said_with_the_way_out(check):
    with pytest.raises(RuntimeError, match=rf"splash attention does not run on {HERE}"):
        check("splash")
