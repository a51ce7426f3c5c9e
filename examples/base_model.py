"""Small base models, fitted by likelihood to responses that a generator samples."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

BOX_OPEN = "\\boxed{"
PAD, END, USER, ASSISTANT = "<pad>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, END, USER, ASSISTANT)
UNKNOWN = "?"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NUM_EVAL = 64


class Task(NamedTuple):
    """What a model is fitted to. Problems have a `prompt` and an `answer`."""

    problems: Sequence[Any]
    sample_response: Callable[[Any, np.random.Generator], str]
    words: Sequence[str]  # of the vocabulary, beside the special ones
    vocab_size: int  # padded, so that it divides over any small mesh
    max_tokens: int = 32  # of a prompt and its response
    pack_length: int = 64


class Split(NamedTuple):
    """Disjoint problems, for fitting the base model, for training it on, and held out."""

    fitted: list[Any]
    train: list[Any]
    held_out: list[Any]


def split(problems: Sequence[Any], num_train: int, seed: int) -> Split:
    order = np.random.default_rng(seed).permutation(len(problems))
    shuffled = [problems[i] for i in order]
    held_out, rest = shuffled[:NUM_EVAL], shuffled[NUM_EVAL:]
    return Split(rest[num_train:], rest[:num_train], held_out)


def make_tokenizer(words: Sequence[str]):
    """A fast tokenizer: one token per character, and one for ``\\boxed{``."""
    import tokenizers
    import transformers

    vocab = {word: i for i, word in enumerate([*SPECIAL, *words, UNKNOWN])}
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocab, unk_token=UNKNOWN)
    )
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
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def model_config(vocab_size: int, stop_id: int):
    """A Qwen2 of 0.14 M parameters."""
    from pfjax.model import rope
    from pfjax.model.families import qwen2

    return qwen2.Config(
        vocab_size=vocab_size,
        embed_dim=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=176,
        rope=rope.RopeConfig(theta=10_000.0),
        norm_eps=1e-6,
        tied_embeddings=True,
        max_positions=512,
        stop_ids=(stop_id,),
    )


def sample_batches(task: Task, tok, batch_size: int, seed: int) -> Iterator[Any]:
    """Yields packed batches of problems and sampled responses, without end."""
    import jax

    from pfjax.batch import PackShape
    from pfjax.model import tokenizer
    from pfjax.packing import max_microbatches, pack, segments_per_row

    rng = np.random.default_rng(seed)
    length = task.pack_length
    shape = PackShape(
        num_microbatches=1,
        microbatch_size=max_microbatches(batch_size, task.max_tokens, 1, length),
        pack_length=length,
        max_segments=segments_per_row(length, task.max_tokens),
    )
    seen = task.problems
    while True:
        problems = [seen[i] for i in rng.integers(len(seen), size=batch_size)]
        prompts = [tokenizer.encode_prompt(tok, p.prompt) for p in problems]
        responses = [
            tok.encode(task.sample_response(p, rng)) + [tok.eos_token_id]
            for p in problems
        ]
        batch, _, _ = pack(
            [np.array(p + r) for p, r in zip(prompts, responses, strict=True)],
            np.array([len(p) for p in prompts]),
            shape,
        )
        yield jax.tree.map(lambda x: x[0], batch)


def fit(task: Task, steps: int, batch_size: int, seed: int):
    """Fits a small Qwen2 to sampled responses; returns a policy and its tokenizer."""
    import jax
    import jax.numpy as jnp

    from pfjax import losses
    from pfjax.model import scoring, transformer
    from pfjax.trainer import optim

    tok = make_tokenizer(task.words)
    config = model_config(task.vocab_size, tok.eos_token_id)
    params = {
        "policy": transformer.init_params(config, jax.random.key(seed)),
        "log_z": {},
    }
    batches = sample_batches(task, tok, batch_size, seed)

    def loss_fn(params, batch):
        log_p, _, _ = scoring.packed_log_probs(config, params["policy"], batch)
        return -losses.masked_mean(log_p, batch.is_response)

    rate = optim.rate("cosine", 3e-3, warmup_steps=min(50, steps), num_steps=steps)
    optimizer = optim.make_optimizer(rate, rate, weight_decay=0.0, clip_norm=1.0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state, loss

    opt_state = optimizer.init(params)
    for step in range(steps):
        params, opt_state, loss = update(params, opt_state, next(batches))
        if step % 200 == 0:
            print(f"step {step}  loss {loss:.4f} nats per token", flush=True)
    return transformer.Policy(config, params["policy"]), tok


def write(out: pathlib.Path, policy, tok, train: Sequence, held_out: Sequence) -> None:
    """Writes a Hugging Face folder, and prompts beside it."""
    from pfjax.model import hf

    hf.save(policy, out)
    tok.save_pretrained(out)
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
        (out / f"{name}.jsonl").write_text(text, "utf-8")
