"""The JobSet is valid by the API's own schema, and says what was meant."""
import json

import jsonschema
import pytest
import yaml

from launch import __main__ as launch
from launch import jobset, shapes


@pytest.fixture(scope='module')
def schema(data_dir):
  """The CRD's schema; a webhook gives rules without a name theirs."""
  return json.loads((data_dir / 'jobset/jobset_v1alpha2.schema.json').read_text())


@pytest.mark.parametrize('slices, tpu, chips, hosts', [
  (1, 'v5e:8', 8, 1), (1, 'v5p:64', 4, 16), (4, 'v6e:16x16', 4, 64), (2, 'tpu7x:2x2x1', 4, 1)])
def test_renders_are_valid(slices, tpu, chips, hosts, schema, capsys):
  arguments = ['train', '--config.data.sources=((\'x "y"\', 1.0),)', '$(HOME) $x\n', 'no', '1e-5']
  assert launch.main(['render', '--run=r', f'--tpu={tpu}', f'--slices={slices}', '--image=i', '--',
                      *arguments]) == 0
  made = yaml.safe_load(capsys.readouterr().out)
  jsonschema.validate(made, schema)
  assert made == jobset.render('r', slices, shapes.parse(tpu), 'i', arguments)
  one = made['spec']['replicatedJobs'][0]
  job = one['template']['spec']
  container = container_of(made)
  limit = container['resources']['limits']['google.com/tpu']
  assert one['replicas'] == slices and job['parallelism'] == hosts == job['completions']
  assert limit == chips and limit * hosts == shapes.parse(tpu).chips
  got = [each.replace('$$', '$') for each in container['command'][3:]]  # as Kubernetes undoes it
  assert got == arguments
  names = {each['name']: each.get('value') for each in container['env']}
  assert names['QWEN3_JAX_HOSTS'] == str(slices * hosts) and names['JAX_PLATFORMS'] == 'tpu'


def container_of(made):
  job = made['spec']['replicatedJobs'][0]['template']['spec']
  return job['template']['spec']['containers'][0]


@pytest.mark.parametrize('spoil', [
  lambda made: made['spec'].update(paralelism=1),
  lambda made: made['spec']['failurePolicy'].update(maxRestarts='3'),
  lambda made: container_of(made)['resources'].update(limits=[4])])
def test_the_schema_finds_faults(spoil, schema):
  made = jobset.render('r', 1, shapes.parse('v6e:8'), 'i', ['x'])
  spoil(made)
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(made, schema)
