"""A recipe's plan: where the parts of a stage come from, and what a stage costs."""
import functools

import pytest
from etils import epath
from ml_collections import ConfigDict

from qwen3_jax.commands.config import load_config
from qwen3_jax.stages import load, recipe

STAGES = (('s1', 'configs/s1.py:tiny'), ('s2', 'configs/s2.py:tiny'),
          ('student', 'configs/s1.py:tiny', {'init': None, 'data.tokenizer': 's1/tokenizer'}),
          ('cold', 'configs/cold_start.py:tiny', {'init': 's1'}),
          ('rl', 'configs/reasoning_rl.py:tiny'),
          ('branch', 'configs/reasoning_rl.py:tiny', {'init': 'cold', 'reference': 's2'}))
RECIPE = ConfigDict(dict(stages=STAGES, seed=7))
plan_in = functools.partial(recipe.make_plan, RECIPE, read=load_config)


def test_links_name_earlier_stages(tmp_path):
  plan = {stage.name: stage for stage in plan_in(workdir=epath.Path(tmp_path))}
  inits = {name: stage.config.init for name, stage in plan.items()}
  assert inits == dict(s1=None, s2=f'{tmp_path}/s1', student=None, cold=f'{tmp_path}/s1',
                       rl=f'{tmp_path}/cold', branch=f'{tmp_path}/cold')
  assert plan['student'].config.data.tokenizer == f'{tmp_path}/s1/tokenizer'
  assert plan['branch'].config.reference == f'{tmp_path}/s2'
  assert [stage.config.seed for stage in plan.values()] == [7, 8, 9, 10, 11, 12]


def test_what_is_given_goes_before_links(tmp_path):
  plan = plan_in(workdir=epath.Path(tmp_path), settings=['s2.init=elsewhere'], until='s2',
                 init='begin')
  assert [stage.config.init for stage in plan] == ['begin', 'elsewhere']


@pytest.mark.parametrize('links, message', [
  ({'init': 's2'}, "s1 takes its init from 's2', but the stages before it are none"),
  ({'init': 's1'}, "from 's1', but")])
def test_a_link_leads_back(tmp_path, links, message):
  wrong = ConfigDict(dict(stages=(('s1', 'configs/s1.py:tiny', links),), seed=0))
  with pytest.raises(ValueError, match=message):
    recipe.make_plan(wrong, epath.Path(tmp_path), load_config)


def test_a_start_behind_others_needs_what_they_made(tmp_path):
  with pytest.raises(FileNotFoundError, match='branch takes its init from cold.*--init=DIR'):
    plan_in(workdir=epath.Path(tmp_path), start='branch')
  with pytest.raises(FileNotFoundError, match='its reference from s2.*--set=branch.reference=DIR'):
    plan_in(workdir=epath.Path(tmp_path), start='branch', init='x')
  stage, = plan_in(workdir=epath.Path(tmp_path), start='branch', init='x',
                   settings=['branch.reference=y'])
  assert (stage.config.init, stage.config.reference, stage.config.seed) == ('x', 'y', 12)


def test_a_stage_of_another_model_is_named(tmp_path):
  with pytest.raises(ValueError, match='s2 starts from s1, whose config.model.width is 64; .* 128'):
    plan_in(workdir=epath.Path(tmp_path), settings=['s1.model.width=64'], until='s2')


def test_costs_are_counted_by_hand():
  config = load_config('configs/s1.py:tiny')
  spec, tokens = load.spec_from(config.model), 500 * 4 * 256
  assert recipe.foresee(config) == (tokens, 0, tokens * spec.flops_per_token(256))
  assert recipe.spent(config.to_dict(), [{}] * 10).trained == 10 * 4 * 256
  rl = load_config('configs/general_rl.py:tiny')  # adapters, and a reference model
  answers = 6 * 64 * 8 * 160
  train, forward = spec.flops_per_token(256, frozen=True), spec.flops_per_token(256) / 3
  assert recipe.foresee(rl) == pytest.approx(
    (answers, 2 * answers, answers * (2 * forward + train + forward)))
  with_teacher = recipe.foresee(rl, spec).flops
  assert with_teacher == pytest.approx(recipe.foresee(rl).flops + answers * forward)
  lines = [dict(tokens=300, prompts=5, answer_tokens=20.0, flops=7e9), dict(tokens=200, flops=1e9)]
  assert recipe.spent(rl.to_dict(), lines) == (500, 800, 8e9)
  assert recipe.foresee(load_config('configs/cold_start.py:0.6b')) is None


def test_plan_is_kept_of_stages_that_are_left_out(tmp_path):
  import json
  workdir = epath.Path(tmp_path) / 'new'
  recipe.keep(plan_in(workdir=workdir, until='s2'), RECIPE, workdir)
  recipe.keep(plan_in(workdir=workdir, until='s1', init='z'), RECIPE, workdir)
  assert json.loads((workdir / 'recipe.json').read_text()) == [name for name, *_ in STAGES]
  assert json.loads((workdir / 'plan.json').read_text()) == {
    's1': {'init': 'z'}, 's2': {'init': 's1'}}
