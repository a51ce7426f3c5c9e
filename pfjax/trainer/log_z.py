"""The log Z' head: log Z'(q), in nats per token, from the states of the prompt.

It belongs to training only and is never exported with the policy.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from pfjax.batch import PackedBatch
from pfjax.model import dial
from pfjax.model.transformer import Params
from pfjax.packing import prompt_mask, segment_sum
from pfjax.targets import Array


class Head(nnx.Module):
    """Two hidden layers as in PowerFlow's trainer, without its dropout.

    The last layer starts at zero, so the output is its bias, which `minibatch.init_log_z`
    sets, and does not depend on the seed. Dropout would give the samples of one
    prompt different log Z' and is left out.
    """

    def __init__(self, embed_dim: int, num_outputs: int, rngs: nnx.Rngs):
        d, n = embed_dim, num_outputs
        zeros = nnx.initializers.zeros
        self.layer1 = nnx.Linear(d, d, rngs=rngs)
        self.norm1 = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)
        self.layer2 = nnx.Linear(d, d, rngs=rngs)
        self.norm2 = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)
        self.out = nnx.Linear(d, n, kernel_init=zeros, bias_init=zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n k"]:
        gelu = lambda y: jax.nn.gelu(y, approximate=False)
        x = self.norm1(gelu(self.layer1(x)))
        x = self.norm2(gelu(self.layer2(x)))
        return self.out(x)


def init_head(
    embed_dim: int, key: Array, alpha_range: tuple[float, ...] = ()
) -> Params:
    num_outputs = 1 + dial.TERMS if alpha_range else 1
    head = Head(embed_dim, num_outputs, nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(head))


def features(batch: PackedBatch, alpha_range: tuple[float, ...]) -> Array:
    """What the outputs of the head are multiplied by, `[*m, B, N, K]`: where each prompt has
    its own alpha log Z' is a function of it, else the only output."""
    if alpha_range:
        return dial.log_z_features(alpha_range, batch.alpha)
    return jnp.ones((*batch.length.shape, 1))


def apply_head(
    params: Params,
    hidden: Float[Array, "b t d"],
    batch: PackedBatch,
    alpha_range: tuple[float, ...] = (),
) -> Float[Array, "b n"]:
    """log Z' of the prompt of each trajectory; meaningful where `batch.is_real`.

    The head reads the mean over the prompt's final states. They cannot see the
    response, attention being causal. Gradients flow on into the policy: detaching
    is reported to cost accuracy (FlowRL, issue 3).
    """
    mask = prompt_mask(batch)
    where = (batch.segment_ids, batch.length.shape[-1])
    total = segment_sum(jnp.where(mask[..., None], hidden, 0), *where)
    count = segment_sum(mask.astype(jnp.float32), *where)
    mean = total / jnp.maximum(count, 1.0)[..., None]
    sizes = params["out"]["kernel"].shape
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Head(*sizes, nnx.Rngs(0))))
    out = nnx.merge(graphdef, params)(mean)
    return (out * features(batch, alpha_range)).sum(axis=-1)
