"""What the pretraining configs share; each file of configs/ then says what is its stage's own."""
import dataclasses

from ml_collections import ConfigDict

from qwen3_jax.spec import RELEASED, Spec

TINY = dict(
    tiny=Spec(layers=4, width=128, heads=4, kv_heads=2, mlp=384, vocab=2048, head_width=32,
              tied=True, max_position=1024, stop_ids=()),
    moe=Spec(layers=4, width=128, heads=4, kv_heads=2, mlp=384, vocab=2048, head_width=32,
             tied=True, max_position=1024, stop_ids=(), experts=16, chosen=4, expert_mlp=96))

# Students of strong-to-weak distillation (report, section 4.5). The tiny one is smaller than its
# teacher, which is the tiny model.
STUDENTS = '0.6b', '1.7b', '4b', '8b', '14b', '30b-a3b'
STUDENT = dict(layers=3, width=96, heads=3, kv_heads=1, mlp=288)

# What the tiny models learn to reason about: problems that a few minutes suffice for.
REASONING = 'tasks:kinds=chain+coin+compass,difficulty=1'
PAIRS = REASONING.replace('tasks', 'pairs', 1)  # the same solved right, and wrong

# Peak learning rate and rows of 4,096 tokens a step. Qwen's are unpublished (they come from scaling
# laws that were not released); these are ours, in the range of comparable open runs, not measured.
RECIPES = {'0.6b': (6e-4, 1024), '1.7b': (5e-4, 1024), '4b': (4e-4, 1024), '8b': (3e-4, 1024),
           '14b': (2.5e-4, 2048), '32b': (2e-4, 2048), '30b-a3b': (4e-4, 2048),
           '235b-a22b': (2e-4, 4096)}


def pretraining(stage, arg, tokens):
  """ConfigDict of a pretraining stage; `arg` is a released size, 'tiny' (dense) or 'tiny,moe'.

  `tokens` is the stage's published token budget, which sets `steps` of a real size. Raises
  ValueError for a size or option that does not exist.
  """
  size, *options = arg.split(',') if arg else ['tiny']
  small = size == 'tiny'
  if not small and size not in RECIPES or options and (not small or options != ['moe']):
    raise ValueError(f'config argument {arg!r}: want {", ".join(RECIPES)}, or tiny, or tiny,moe')
  spec = TINY['moe' if options else 'tiny'] if small else RELEASED[f'{size}-base']
  peak, rows = (4e-3, 16) if small else RECIPES[size]
  config = ConfigDict(dict(
      stage=stage, method='pretrain', seed=0, init=None, model=_fields(spec),
      # None: of data one part a slice, of fsdp the devices that remain.
      mesh=dict(data=None, fsdp=None, expert=1, context=1, tensor=1),
      dtype='float32' if small else 'bfloat16', remat='none' if small else 'full', micro_batches=1,
      xla=None,  # a preset of TPU compiler flags: scaling.flags
      # The type in which a device sends its share of a matrix's gradient; shares are added in
      # float32. In bfloat16 the sum is off by at most 2^-8 of the sum of the shares' absolute
      # values; where each has noise of its own, by at most 2^-8 of the sum's.
      gradients='float32' if small else 'bfloat16',
      balance=0.008 if spec.experts else None,  # global-batch weight (2501.11873): HF's 0.001 x 8
      router_z=0.001 if spec.experts else None,
      # Adapters of a frozen model where a rank is given. With alpha 32 a good learning rate hardly
      # depends on the rank, and is about ten times that of training all weights (Schulman et al.
      # 2025, "LoRA Without Regret"). Targets None: see `model.lora.choose_targets`.
      lora=dict(rank=None, alpha=32.0, targets=None),
      steps=tokens // (rows * 4096), save_every=1000, keep=3, evaluate_every=1000,
      data=dict(sources=None, weights=(), heldout=(), batch=rows, length=4096, length_mix=None,
                heldout_batches=8, tokenizer=None, tokenizer_size=2048 if small else None),
      # kind: adamw or muon; moments: float32, bfloat16 or factored. See training/optim.py.
      optim=dict(kind='adamw', moments='float32', schedule='constant', peak_lr=peak, warmup=2000,
                 final=0.1, decay=0.2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)),
      type_safe=False)
  config.model.rope_theta = 1e4  # S3 raises it
  if small:
    config.update(dict(save_every=50, evaluate_every=50, data=dict(length=256, heldout_batches=4)))
    config.optim.warmup = 10
  return config


def supervised(stage, arg, tiny_steps):
  """ConfigDict of supervised fine-tuning; `arg` as in `pretraining`.

  A real size has the settings of Qwen2.5's fine-tuning (2412.15115, section 4.1): 2 epochs, rows of
  32,768 tokens, learning rate 7e-6 to 7e-7, weight decay 0.1, gradients clipped at 1. Qwen3's own
  are unpublished. Rows a step, and that the rate falls along a cosine, are ours.
  """
  config = pretraining(stage, arg, tokens=0)
  small = config.model.layers == 4
  config.method, config.model.rope_theta = 'sft', 1e6
  config.epochs, config.steps = (None, tiny_steps) if small else (2, None)
  config.stop_loss = None  # on held-out conversations: ends the stage before its last step
  del config.data.weights  # of documents
  config.prepare = None  # see commands.prepare
  config.measure = measure_modes(small)
  config.data.update(dict(skip_bad=False, too_long='drop', keep_whole=32))
  if small:
    config.data.length, config.data.batch = 256, 4
  else:
    config.model.max_position = 40_960
    config.data.length, config.data.batch = 32_768, 32
    config.optim.update(dict(schedule='cosine', peak_lr=7e-6, warmup=50, final=0.1))
  return config


def measure_modes(small):
  """How a recipe measures a stage's model in both modes: the arguments of `evaluate.run`."""
  if small:
    return dict(tasks=REASONING, count=256, flags=128, budgets=(), max_tokens=160,
                plain_penalty=None)  # an answer may repeat a digit
  return dict(tasks='tasks', count=512, flags=256, budgets=(), max_tokens=8192)


def _fields(spec):
  fields = dataclasses.asdict(spec)
  return fields | dict(mlp_only=tuple(spec.mlp_only), stop_ids=tuple(spec.stop_ids))


def preference(stage, arg, method, **own):
  """ConfigDict of training on pairs of answers, `own` being the loss's settings; `arg` as above.

  The tiny form learns from generated pairs: problems solved right, and wrong.
  """
  config = pretraining(stage, arg, tokens=0)
  small = config.model.layers == 4
  config.method, config.model.rope_theta = method, 1e6
  config.update(own)
  del config.data.length_mix, config.data.weights
  config.data.update(dict(keep_whole=32, tokenizer_size=None, heldout_batches=16))
  config.epochs, config.steps = 1, None
  if small:
    config.data.length, config.data.batch = 512, 8
  else:
    config.model.max_position = 40_960
  return config


def reinforcement(stage, arg, **own):
  """ConfigDict of reinforcement learning; `arg` as in `pretraining`, `own` overrides sections.

  Qwen3 published neither batch, group, rate nor clip: these are what later open work settled on
  (DAPO 2503.14476, ScaleRL 2510.13786, MiniRL 2512.01374), not measured here at real sizes. A
  mixture of experts takes GSPO (2507.18071) with the engine's routes replayed (R3, 2510.11370).
  """
  config = pretraining(stage, arg, tokens=0)
  small, sparse = config.model.layers == 4, bool(config.model.experts)
  config.method, config.model.rope_theta = 'rl', 1e6
  config.balance = config.router_z = None  # routing is replayed, not taught
  del config.micro_batches  # an update has as many rows as its answers fill; these are run at once:
  config.micro_rows = None if small else 16
  config.reference = None  # of the KL term; None: init
  config.policy = dict(kind='gspo' if sparse else 'dapo', clip_low=None, clip_high=None,
                       dual_clip=None, beta=0.0, kl='unbiased', correction='token_tis',
                       correction_low=None, correction_high=None, temperature=1.0, entropy='bonus',
                       cov_penalty=1.0, advantage='group_mean_batch_std', aggregation=None)
  config.rollout = dict(prompts=512, samples=16, updates=4, rounds=3, temperature=1.0,
                        max_tokens=30_000, thinking_budget=None, overlong='mask', old='trainer',
                        replay='engine' if sparse else None)
  # Which chips train and which draw (`stages.placement`); ahead: draw while training, one rollout
  # behind.
  config.placement = dict(kind='colocated', fraction=None, slices=None, rollout_mesh=None,
                          ahead=False)
  config.engine = dict(rows=256, pages=None, page=None, chunk=None)
  # Steady or rising (report, section 4.2); the first entropy measured is the target.
  config.entropy = dict(target=None, width=0.25, delta=0.001, start=0.0, least=0.0, most=0.01,
                        rise=0.0)
  config.parity = dict(every=10, mean=0.02, max=None, kl=0.005, ess=0.9)
  config.curriculum = dict(high=0.9)
  config.rewards = dict(defaults={}, gates=('mode',), code=None, judge=None, reward_model=None,
                        functions=(), workers=8, seconds={})
  config.measure_reward = dict(prompts=512, samples=4)
  config.measure = measure_modes(small)
  del config.data.length_mix, config.data.weights, config.data.heldout_batches
  config.data.update(dict(used=(), tokenizer_size=None, length=32_768, batch=16))
  config.steps, config.save_every, config.evaluate_every = 680, 40, 20  # 170 rollouts
  config.optim.update(dict(schedule='constant', peak_lr=1e-6, warmup=20, weight_decay=0.0))
  config.model.max_position = 40_960
  if small:
    config.model.max_position = 1024
    config.rollout.update(dict(prompts=64, samples=8, updates=4, rounds=2, max_tokens=160,
                               old='engine'))
    config.policy.correction = None  # the engine's policy is the old one: they agree to 1e-6
    config.policy.kind = 'dapo'  # at this learning rate GSPO's band would leave few answers
    config.engine.update(dict(rows=128, pages=1280))  # 128 texts of 256 tokens and their prompts
    config.rewards.workers = 2
    config.entropy.update(dict(width=0.5, delta=0.01, start=0.01, most=0.1))
    config.parity.update(dict(every=10, mean=1e-4, kl=1e-4))
    config.measure_reward = dict(prompts=256, samples=2)
    config.data.length, config.data.batch = 256, 16
    config.steps, config.save_every, config.evaluate_every = 100, 20, 50
    config.optim.update(dict(schedule='linear', peak_lr=5e-3, warmup=12, b2=0.99))
    if sparse:
      config.optim.peak_lr = 6e-4
    else:  # of all weights most would only take up noise: `tests/benchmarks/rl_sweep.py`
      config.lora.rank = 16
  for name, values in own.items():
    config[name].update(values)
  return config


def make_student(config, arg):
  """The config with the student's model that `arg` names; ValueError where it names none."""
  size = (arg or 'tiny').split(',')[0]
  if size == 'tiny':
    config.model.update(STUDENT)
    if config.model.experts:
      config.model.update(dict(experts=8, chosen=2))
  elif size not in STUDENTS:
    raise ValueError(f'config argument {arg!r}: want {", ".join(STUDENTS)}, or tiny, or tiny,moe: '
                     'a larger model is a teacher')
  return config
