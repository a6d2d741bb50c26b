"""General RL: over 20 tasks of five families, rules, a judge and a reward model (report, 4.4).

Mixture and algorithm are unpublished; shares, weights and the small KL term are ours. Give the
folders of a judge (`rewards.judge`) and of a reward model (`rewards.reward_model`), or leave their
sources out. The tiny form has the tasks that a model of its size can begin to solve, by rules.
"""
from qwen3_jax.stages.defaults import reinforcement

SOURCES = (  # of each family, in the order of `data.queries`
  ('tasks:thinking=mixed', 2.0), ('countdown', 1.0), ('logic', 1.0), ('sorting', 0.5),
  ('strings', 0.5), ('choice', 0.5), ('code', 2.0),
  ('rule:thinking=mixed', 1.5), ('rules:thinking=mixed', 1.5), ('length:thinking=mixed', 1.0),
  ('mode', 2.0), ('json:thinking=mixed', 1.0),
  ('judged:thinking=mixed', 2.0), ('open:thinking=mixed', 2.0),
  ('tools:thinking=mixed', 1.0), ('tools_many:thinking=mixed', 1.0),
  ('tools_none:thinking=mixed', 0.5), ('episodes:names=calculator', 0.5),
  ('episodes:names=python', 0.5), ('episodes:names=store', 0.5), ('episodes:names=todo', 0.5),
  ('episodes:names=files', 0.5), ('rag:thinking=mixed', 1.0), ('rag_none:thinking=mixed', 0.5),
  ('translate', 0.5), ('language:thinking=mixed', 0.5))
TINY = (
  ('tasks:kinds=chain,difficulty=1,thinking=mixed', 1.0),
  ('tasks:kinds=coin,difficulty=1,thinking=mixed', 1.0),
  ('tasks:kinds=compass,difficulty=1,thinking=mixed', 1.0), ('mode:difficulty=1', 1.0),
  ('length:difficulty=1,thinking=mixed', 1.0), ('rule:difficulty=1,thinking=mixed', 1.0))


def get_config(arg):
  config = reinforcement('general_rl', arg, policy=dict(beta=1e-3, advantage='decoupled'))
  small = config.model.layers == 4
  config.data.sources = TINY if small else SOURCES
  config.data.heldout = tuple(name for name, _ in config.data.sources)
  if small:
    config.steps, config.save_every, config.evaluate_every = 24, 12, 24
    config.optim.peak_lr = 6e-4 if config.model.experts else 2e-3  # more undoes what it could do
  else:
    config.rewards.code = True
    config.steps = 400
  return config
