"""The log Z' head: log Z'(q), in nats per token, from the states of the prompt.

It belongs to training only and is never exported with the policy.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from pfjax.batch import Array, PackedBatch, prompt_mask, segment_sum
from pfjax.model.transformer import Params


class Head(nnx.Module):
    """Two hidden layers as in PowerFlow's trainer, without its dropout.

    The last layer starts at zero, so the output is its bias, which `minibatch.init_log_z`
    sets, and does not depend on the seed. Dropout would give the samples of one
    prompt different log Z' and is left out.
    """

    def __init__(self, embed_dim: int, rngs: nnx.Rngs):
        d = embed_dim
        zeros = nnx.initializers.zeros
        self.layer1 = nnx.Linear(d, d, rngs=rngs)
        self.norm1 = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)
        self.layer2 = nnx.Linear(d, d, rngs=rngs)
        self.norm2 = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)
        self.out = nnx.Linear(d, 1, kernel_init=zeros, bias_init=zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n"]:
        gelu = lambda y: jax.nn.gelu(y, approximate=False)
        x = self.norm1(gelu(self.layer1(x)))
        x = self.norm2(gelu(self.layer2(x)))
        return self.out(x)[..., 0]


def init_head(embed_dim: int, key: Array) -> Params:
    return nnx.to_pure_dict(nnx.state(Head(embed_dim, nnx.Rngs(params=key))))


def apply_head(
    params: Params, hidden: Float[Array, "b t d"], batch: PackedBatch
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
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Head(mean.shape[-1], nnx.Rngs(0))))
    return nnx.merge(graphdef, params)(mean)
