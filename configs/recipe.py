"""The recipe: the stages in order, each starting from the weights of the one before."""
from ml_collections import ConfigDict

STAGES = 's1', 's2', 's3', 'cold_start', 'reasoning_rl', 'fusion', 'general_rl'


def get_config(arg):
  arg = arg or 'tiny'
  stages = tuple((name, f'configs/{name}.py:{arg}') for name in STAGES)
  return ConfigDict(dict(stages=stages, seed=0))
