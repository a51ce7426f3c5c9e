"""Every setting, with its default. Recipes change what differs.

Values that the paper leaves open are marked "chosen".
"""

import dataclasses

import ml_collections

from pfjax.sampler import options


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()

    # What is trained.
    c.model = "pfjax/toy"  # Hugging Face folder or hub id; pfjax/toy is built in
    c.objective = "powerflow"  # a name in pfjax/objectives.py
    c.alpha = 4.0  # > 1 sharpens, < 1 flattens
    c.psi_unboxed = -0.5  # psi of a response without \boxed{}; 0 switches it off
    c.log_z = "head"  # "head" learns log Z' from the prompt; "group" averages samples;
    # rl_traj and rl_token always average, subtb and rewards of answers have none

    # Prompts: .jsonl or .parquet file, hub name[:split], or pfjax/toy/<file>.
    c.data = ml_collections.ConfigDict()
    c.data.train = "pfjax/toy/train.jsonl"
    c.data.eval = "pfjax/toy/eval.jsonl"  # held out; "" for no evaluation
    c.data.target = (
        ""  # samples of the target, by pfjax.sample --method=smc: evaluations
    )
    # then bound its sum from both sides (eval/elbo, eval/eubo)
    c.data.suffix = ""  # added to the last message of each prompt, as it is
    c.data.max_prompt_tokens = 1024  # longer ones are skipped

    # A step: two batch numbers; the rest follows from them.
    c.num_steps = 500
    c.prompts_per_step = 32  # chosen
    c.samples_per_prompt = 32  # chosen
    c.max_new_tokens = 3072  # a response is cut there
    c.temperature = 1.0  # of sampling in training
    c.rollout_slots = 0  # samples decoded at once; 0: as many as memory holds
    c.updates_per_rollout = 1  # mini-batches a step; 1 is exactly on policy
    c.seed = 0

    # Ratios pi / pi_old, when updates_per_rollout > 1: of sequences (balance, EMPO) or
    # of tokens (GRPO and its kin) they are clipped to [low, high].
    c.importance = ml_collections.ConfigDict()
    c.importance.low = 0.8
    c.importance.high = 1.28
    c.importance.keep_band = False  # the paper's trainer: tokens whose ratio is outside
    # are left out of the sums and of the length

    # Rivals only.
    c.flowrl_beta = 15.0  # of the advantage in FlowRL's residual
    c.reward_kl = 0.0  # of KL to the base a token: grpo, ttrl, empo, intuitor

    c.optim = ml_collections.ConfigDict()
    c.optim.learning_rate = 1e-6
    c.optim.log_z_learning_rate = 1e-3  # chosen; nats that log Z' may move a step
    c.optim.warmup_steps = 0
    c.optim.weight_decay = 0.1
    c.optim.clip_norm = 1.0
    c.optim.mu_dtype = "float32"  # of Adam's first moment; bfloat16 spares a sixth

    # Low-rank adapters instead of all weights; policy and base then share theirs.
    c.lora = ml_collections.ConfigDict()
    c.lora.rank = 0  # 0 trains all weights
    c.lora.alpha = 32.0  # chosen; the adapters' output is scaled by alpha / rank

    # Shape of the packed micro-batches: rows x row_length tokens on each of the
    # mesh.data * mesh.fsdp parts of the batch.
    c.rows = 1
    c.row_length = 4096  # at least max_prompt_tokens + max_new_tokens
    c.dtype = "bfloat16"  # of the computation; master weights are float32
    c.base_memory = (
        "device"  # where the frozen base waits; or "host", for small devices
    )
    c.attention = "auto"  # back end over packed rows; see pfjax/model/attention.py
    c.remat = "full"  # layers computed again in the backward pass: all of it ("full"),
    # all but attention ("attention"), all but products with weights ("dots"), "none"

    # Devices; one may be -1, which takes what is left.
    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.tensor = 1

    # Evaluation, at step 0, every eval_every steps, and after the last.
    c.eval_every = 40
    c.eval_samples = 16  # k of avg@k
    # With every filter of pfjax/sampler/options.py, which explains them; none acts.
    c.eval_sampling = ml_collections.ConfigDict(dataclasses.asdict(options.NO_FILTERS))
    c.eval_sampling.temperature = 1.0  # 0 is greedy
    c.eval_sampling.stop_strings = ()  # texts that end a response

    # Records.
    c.log_every = 1  # steps between plain lines when nobody watches
    c.checkpoint_every = 40
    c.keep_best = 1  # checkpoints kept beside the latest two: those with the highest
    c.best_metric = "eval/avg"  # metric, named up to the "@"
    c.profile_steps = (0, 0)  # steps traced by JAX's profiler: first, and first after
    # What is watched during a run. A loss that is not finite always stops it.
    c.guards = ml_collections.ConfigDict()
    c.guards.action = "stop"  # or "warn", "off": when one of these has lasted
    c.guards.patience = 10  # steps
    c.guards.length_floor = 0.25  # mean length under this share of the start's
    c.guards.truncated_ceiling = 0.99  # at least this share of responses cut
    c.guards.step_seconds = 3600.0  # after which a stuck step tells where it stands
    c.wandb_project = ""  # needs the extra `wandb`; "" for none
    return c.lock()
