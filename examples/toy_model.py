r"""The toy task: sums of two-digit numbers, and how its base model was made.

    python -m examples.toy_model --out=pfjax/assets/toy

A prompt asks for the sum of two numbers whose units carry, such as ``47+35``. The
base model answers in one of two ways, always ending in a box:

- with probability 0.7 it reasons, ``7+5=12,4+3+1=8;\boxed{82}``: for each digit the
  sum with its carry, then one of two separators at random. Each sum has an incorrect
  last digit with probability 0.2, and an error is carried on.
- else it guesses, ``\boxed{82}``, and drops the carry in 60 % of cases.

A reasoned trace is correct with probability 0.64 and a guess with 0.4, but the
likeliest whole response of most prompts is an incorrect guess, being short. Sharpening
whole sequences therefore collapses onto guesses, and sharpening per token does not:
the effect of the PowerFlow paper, with answers that are known.

The command trains a transformer of 0.14 M parameters on such responses and writes it
as a Hugging Face folder with a tokenizer and chat template, beside prompts for
training and a held-out set for evaluation, neither of which it saw.
"""

import functools
import json
import pathlib
from typing import NamedTuple

import numpy as np
from absl import app, flags

SEPARATORS = (",", ";")
BOX_OPEN, BOX_CLOSE = "\\boxed{", "}"
PAD, END, USER, ASSISTANT = "<pad>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, END, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
P_GUESS, P_DROP_CARRY, P_STEP_WRONG = 0.3, 0.6, 0.2
VOCAB_SIZE = 32  # padded, so that it divides over any small mesh
NUM_EVAL, NUM_TRAIN = 64, 1024


class Problem(NamedTuple):
    """Two numbers of two digits whose units sum to 10 or more."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}"

    @property
    def answer(self) -> str:
        return str(self.a + self.b)


def all_problems() -> list[Problem]:
    numbers = range(10, 100)
    return [Problem(a, b) for a in numbers for b in numbers if a % 10 + b % 10 >= 10]


def sample_response(problem: Problem, rng: np.random.Generator) -> str:
    """One response of the ideal base model."""
    (a1, a0), (b1, b0) = divmod(problem.a, 10), divmod(problem.b, 10)
    if rng.random() < P_GUESS:
        dropped = 10 if rng.random() < P_DROP_CARRY else 0
        return f"{BOX_OPEN}{problem.a + problem.b - dropped}{BOX_CLOSE}"

    def noisy(total: int) -> int:
        if rng.random() < P_STEP_WRONG:
            total += (1 + int(rng.integers(9)) + total) % 10 - total % 10
        return total

    units = noisy(a0 + b0)
    carry = units // 10
    tens = noisy(a1 + b1 + carry)
    first, second = rng.choice(SEPARATORS, size=2)
    steps = f"{a0}+{b0}={units}{first}{a1}+{b1}+{carry}={tens}{second}"
    return f"{steps}{BOX_OPEN}{tens * 10 + units % 10}{BOX_CLOSE}"


def make_tokenizer():
    """A fast tokenizer: one token per character, and one for ``\\boxed{``."""
    import tokenizers
    import transformers

    words = [*SPECIAL, BOX_OPEN, BOX_CLOSE, *"0123456789+=", *SEPARATORS, "?"]
    vocab = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"\\boxed\{|."), behavior="isolated"
    )
    # Added tokens are matched before any pre-tokenizer: transformers 5 puts Qwen's
    # own in place of the file's for every model of type qwen2.
    backend.add_tokens([tokenizers.AddedToken(BOX_OPEN, normalized=False)])
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token="?",
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def model_config(stop_id: int):
    """A Qwen2 of 0.14 M parameters."""
    from pfjax.model import rope, transformer

    return transformer.ModelConfig(
        vocab_size=VOCAB_SIZE,
        embed_dim=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=176,
        rope=rope.RopeConfig(theta=10_000.0),
        norm_eps=1e-6,
        tied_embeddings=True,
        qkv_bias=True,
        max_positions=512,
        stop_ids=(stop_id,),
    )


def sample_batches(tok, batch_size: int, seed: int):
    """Yields packed batches of problems and sampled responses, without end."""
    import jax

    from pfjax.batch import PackShape, max_microbatches, pack, segments_per_row
    from pfjax.model import tokenizer

    seen = split_problems(seed)[0]
    rng = np.random.default_rng(seed)
    pack_length = 64
    shape = PackShape(
        num_microbatches=1,
        microbatch_size=max_microbatches(batch_size, 32, 1, pack_length),
        pack_length=pack_length,
        max_segments=segments_per_row(pack_length, 32),
    )
    while True:
        problems = [seen[i] for i in rng.integers(len(seen), size=batch_size)]
        prompts = [tokenizer.encode_prompt(tok, p.prompt) for p in problems]
        responses = [
            tok.encode(sample_response(p, rng)) + [tok.eos_token_id] for p in problems
        ]
        batch, _, _ = pack(
            [np.array(p + r) for p, r in zip(prompts, responses, strict=True)],
            np.array([len(p) for p in prompts]),
            shape,
        )
        yield jax.tree.map(lambda x: x[0], batch)


def pretrain(steps: int, batch_size: int, seed: int):
    """Fits a small Qwen2 to sampled responses; returns a policy."""
    import jax
    import jax.numpy as jnp

    from pfjax import losses
    from pfjax.model import log_probs, transformer
    from pfjax.trainer import optim

    tok = make_tokenizer()
    config = model_config(tok.eos_token_id)
    params = {
        "policy": transformer.init_params(config, jax.random.key(seed)),
        "log_z": {},
    }
    batches = sample_batches(tok, batch_size, seed)

    def loss_fn(params, batch):
        log_p, _, _ = log_probs.packed_log_probs(config, params["policy"], batch)
        return -losses.masked_mean(log_p, batch.is_response)

    # Large steps first, then small ones to settle.
    for fraction, peak in ((0.6, 3e-3), (0.25, 6e-4), (0.15, 1e-4)):
        rate = optim.rate("constant", peak, warmup_steps=50, num_steps=steps)
        optimizer = optim.make_optimizer(rate, rate, weight_decay=0.0, clip_norm=1.0)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(params, opt_state, batch, optimizer=optimizer):
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            new = jax.tree.map(jnp.add, params, updates)
            return new, opt_state, loss

        opt_state = optimizer.init(params)
        for i in range(int(fraction * steps)):
            params, opt_state, loss = update(params, opt_state, next(batches))
            if i % 200 == 0:
                print(f"rate {rate:g}  step {i}  loss {loss:.4f} nats per token")
    return transformer.Policy(config, params["policy"])


def split_problems(seed: int) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Problems for pre-training, for PowerFlow, and held out: disjoint."""
    problems = all_problems()
    order = np.random.default_rng(seed).permutation(len(problems))
    shuffled = [problems[i] for i in order]
    held_out, rest = shuffled[:NUM_EVAL], shuffled[NUM_EVAL:]
    return rest[NUM_TRAIN:], rest[:NUM_TRAIN], held_out


def write(out: pathlib.Path, steps: int, batch_size: int, seed: int) -> None:
    """Trains the base model and writes its folder."""
    from pfjax.model import hf

    hf.save(pretrain(steps, batch_size, seed), out)
    make_tokenizer().save_pretrained(out)
    _, train, held_out = split_problems(seed)
    for name, problems in (
        ("train", train),  # no answers: PowerFlow needs none
        ("train_answered", train),  # for the objectives that do
        ("eval", held_out),
    ):
        rows = [
            {"prompt": p.prompt} | ({} if name == "train" else {"answer": p.answer})
            for p in problems
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    write(pathlib.Path(_OUT.value), _STEPS.value, _BATCH.value, _SEED.value)
    print(f"wrote {_OUT.value}")


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "folder to write", required=True)
    _STEPS = flags.DEFINE_integer("steps", 3000, "updates")
    _BATCH = flags.DEFINE_integer("batch", 256, "responses an update")
    _SEED = flags.DEFINE_integer("seed", 0, "of problems, responses and parameters")
    app.run(main)
