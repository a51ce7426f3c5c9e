r"""A loss of pfjax in a trainer of torch: arrays cross by DLPack, gradients by jax.vjp.

    pip install torch
    python -m examples.torch_trainer

The policy is a softmax over five listed responses, trained by torch's Adam to the base's
power 4, length-aware: p_0^4 e^{-lambda |y|}. With a language model `log_pf` is the sum of its
log-probs over a response's tokens, and nothing else changes. On a GPU the arrays stay there
if JAX has its CUDA build. Takes seconds.
"""

import jax
import jax.numpy as jnp
import torch

from pfjax import losses

ALPHA = 4.0


class PowerFlow(torch.autograd.Function):
    """Mean of `losses.powerflow`, differentiable in `log_pf` and `log_z`."""

    @staticmethod
    def forward(ctx, log_pf, log_z, log_p_base, length):
        log_pf, log_z, log_p_base, length = (
            jnp.from_dlpack(x.detach().contiguous())
            for x in (log_pf, log_z, log_p_base, length)
        )
        loss_fn = lambda log_pf, log_z: losses.powerflow(
            log_pf, log_p_base, log_z, length, alpha=ALPHA
        ).mean()
        loss, ctx.vjp = jax.vjp(loss_fn, log_pf, log_z)
        return torch.from_dlpack(loss)

    @staticmethod
    def backward(ctx, gradient):
        grads = ctx.vjp(jnp.from_dlpack(gradient.detach()))
        return *(torch.from_dlpack(x) for x in grads), None, None


def target(log_p_base, length):
    """p_0^alpha e^{-lambda |y|}, with the lambda for which it sums to 1, by bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        lam = (low + high) / 2
        total = torch.exp(ALPHA * log_p_base - lam * length).sum()
        low, high = (lam, high) if total > 1 else (low, lam)
    return torch.exp(ALPHA * log_p_base - lam * length)


def main() -> None:
    torch.manual_seed(0)
    length = torch.tensor([1, 2, 3, 5, 8], dtype=torch.int32)
    log_p_base = torch.log_softmax(torch.randn(5), dim=0)
    logits = torch.nn.Parameter(log_p_base.clone())
    log_z = torch.nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.Adam([logits, log_z], lr=0.05)
    want = target(log_p_base, length)
    for step in range(401):
        log_pf = torch.log_softmax(logits, dim=0)
        loss = PowerFlow.apply(log_pf, log_z, log_p_base, length)
        if step % 100 == 0:
            distance = 0.5 * (log_pf.exp() - want).abs().sum()
            print(f"step {step:3}  loss {loss:.5f}  total variation {distance:.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
