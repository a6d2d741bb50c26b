"""The same run as a JobSet for GKE: one replicated job, a replica a slice, a pod a host."""
import json

from launch.cloud import LABEL
from launch.shapes import GENERATIONS
from launch.supervise import CONFIG, PREEMPTED

NAME = 'qwen3-jax'
FATAL = (2, 3, CONFIG)


def render(run, slices, piece, image, arguments, failures=3, environment=None):
  """The JobSet as a dict: `slices` of the `shapes.Slice` `piece` run `python -m qwen3_jax` with
  `arguments` in `image`.

  A pod that ends with PREEMPTED, or whose node is taken away, restarts the whole set as often as it
  takes; other ends may be `failures`; bad input (FATAL) fails it at once. Kubernetes would read
  $(NAME) in an argument as a variable: dollars are doubled, which it undoes.
  """
  container = {
    'name': NAME, 'image': image, 'command': [
      'python', '-m', 'qwen3_jax', *(each.replace('$', '$$') for each in arguments)],
    'ports': [{'containerPort': 8476}, {'containerPort': 8477}],
    'env': variables(run, slices, piece, environment or {}),
    'resources': {'limits': {'google.com/tpu': piece.chips // piece.hosts}}}
  pod = {'restartPolicy': 'Never', 'terminationGracePeriodSeconds': 60, 'nodeSelector': {
    'cloud.google.com/gke-tpu-accelerator': GENERATIONS[piece.generation].label,
    'cloud.google.com/gke-tpu-topology': piece.grid}, 'containers': [container]}
  ends = [{'action': 'FailJob', 'onExitCodes': {
    'containerName': NAME, 'operator': 'In', 'values': codes}} for codes in ([*FATAL], [PREEMPTED])]
  taken = {'action': 'FailJob', 'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}]}
  job = {'parallelism': piece.hosts, 'completions': piece.hosts, 'completionMode': 'Indexed',
         'backoffLimit': 0, 'podFailurePolicy': {'rules': [*ends, taken]},
         'template': {'spec': pod}}
  why = {'onJobFailureReasons': ['PodFailurePolicy']}
  fatal = '|'.join(map(str, FATAL))
  policy = {'maxRestarts': failures, 'rules': [
    {'name': 'badInput', 'action': 'FailJobSet', **why,
     'onJobFailureMessagePatterns': [f'exit code ({fatal})( |$)']},
    {'name': 'preempted', 'action': 'RestartJobSetAndIgnoreMaxRestarts', **why}]}
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
    'metadata': {'name': run, 'labels': {LABEL: run}, 'annotations': {
      'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}},
    'spec': {'failurePolicy': policy,
             'network': {'enableDNSHostnames': True, 'subdomain': run},
             'replicatedJobs': [{'name': 'slice', 'replicas': slices, 'template': {'spec': job}}]}}


def variables(run, slices, piece, environment):
  """The container's environment: how the hosts find one another (see training/hosts.py)."""
  values = {'JAX_PLATFORMS': 'tpu', 'PYTHONUNBUFFERED': '1',
            'QWEN3_JAX_HOSTS': str(slices * piece.hosts),
            'QWEN3_JAX_SLICE_HOSTS': str(piece.hosts),
            'QWEN3_JAX_COORDINATOR': f'{run}-slice-0-0.{run}:8476', **environment}
  fields = {'QWEN3_JAX_HOST': "metadata.annotations['batch.kubernetes.io/job-completion-index']",
            'QWEN3_JAX_SLICE': "metadata.annotations['jobset.sigs.k8s.io/job-index']"}
  return [*({'name': name, 'value': value} for name, value in values.items()),
          *({'name': name, 'valueFrom': {'fieldRef': {'fieldPath': path}}}
            for name, path in fields.items())]


def to_yaml(value, indent=0):
  """Lines of YAML of dicts, lists, texts and numbers; every text is quoted: it stays a text."""
  pad = '  ' * indent
  if isinstance(value, dict) and value:
    for key, each in value.items():
      if isinstance(each, (dict, list)) and each:
        yield f'{pad}{_key(key)}:'
        yield from to_yaml(each, indent + 1)
      else:
        yield f'{pad}{_key(key)}: {json.dumps(each)}'
  elif isinstance(value, list):
    for each in value:
      if isinstance(each, (dict, list)) and each:
        first, *rest = to_yaml(each, indent + 1)
        yield f'{pad}- {first.lstrip()}'
        yield from rest
      else:
        yield f'{pad}- {json.dumps(each)}'


def _key(key):
  return key if key.isidentifier() else json.dumps(key)
