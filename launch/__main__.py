"""Runs qwen3_jax on Cloud TPUs: `python -m launch COMMAND ...`, from the repository's folder.

Needs Python 3.11 or later and the Google Cloud CLI, signed in (`gcloud auth login`), nothing else.
A run has a name; what it uses is called qwen3-NAME and labelled, so that every command finds it
again, and a command typed twice does not pay twice.

  python -m launch run --run=s1 --tpu=v5p:16 --zone=us-east5-a --spot -- \\
      train --config=configs/s1.py:0.6b --workdir=gs://bucket/s1
  python -m launch status --run=s1 --zone=us-east5-a
  python -m launch render --run=s1 --tpu=v6e:4x4 --image=IMAGE -- train ... > s1.yaml
"""
import argparse
import json
import re
import signal
import sys
import tempfile
from pathlib import Path

from launch import jobset, pack, shapes
from launch.cloud import Cloud, CloudError, Request, say
from launch.supervise import CONFIG, Clock, Limits, Spent, Watch, bring_up, on_host, supervise

REPO = Path(__file__).resolve().parents[1]
NAME = re.compile('[a-z]([-a-z0-9]{0,38}[a-z0-9])?')


def make_parser():
  parser = argparse.ArgumentParser(prog='python -m launch', description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
  for name, text in COMMANDS.items():
    one = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    one.add_argument('--run', required=name != 'down', metavar='NAME',
                     help='the name of the run: small letters, digits and -')
    if name != 'render':
      add_place(one)
    if name in ('up', 'run', 'render', 'preflight'):
      add_shape(one)
    if name in ('up', 'run'):
      add_request(one)
    if name in ('run', 'preflight'):
      add_job(one)
    if name == 'run':
      add_limits(one)
    if name == 'render':
      one.add_argument('--image', required=True, help='container image with qwen3_jax installed')
      one.add_argument('--max-failures', type=int, default=Limits().failures)
    if name == 'logs':
      one.add_argument('--lines', type=int, default=40, help='of each host (default: 40)')
      one.add_argument('--host', default='all', help='number of one host (default: all)')
    if name == 'down':
      one.add_argument('--all', action='store_true', help='every run of the zone')
    if name in ('run', 'render'):
      one.add_argument('arguments', nargs=argparse.REMAINDER, metavar='-- ARGUMENTS',
                       help='of python -m qwen3_jax, after --')
  return parser


COMMANDS = {
  'up': 'bring up the TPUs of a run and leave them there',
  'run': 'bring up TPUs, run a command on every host, again after preemption, delete the TPUs',
  'status': 'what exists of a run and what its hosts do',
  'logs': 'the last lines of the log of every host',
  'down': 'delete what a run, or every run (--all), uses',
  'preflight': 'check hosts, chips, versions, the network and the folder that a run is to write to',
  'render': 'print the same run as a JobSet for GKE'}


def add_place(parser):
  parser.add_argument('--zone', required=True, help='e.g. us-east5-a')
  parser.add_argument('--project', help="default: gcloud's own")
  parser.add_argument('--dry-run', action='store_true', help='print every command, start none')


def add_shape(parser):
  parser.add_argument('--tpu', required=True, metavar='GENERATION:SIZE',
                      help='chips or topology: v5p:16, v6e:4x8')
  parser.add_argument('--slices', type=int, default=1, help='of that shape (default: 1)')


def add_request(parser):
  kind = parser.add_mutually_exclusive_group()
  for name in ('spot', 'reserved'):
    kind.add_argument(f'--{name}', dest='capacity', action='store_const', const=name,
                      default='on-demand', help=f'{name} capacity (default: on demand)')
  parser.add_argument('--runtime', help='software version of the TPU VMs (default: that of the '
                      'generation)')
  parser.add_argument('--valid-minutes', type=int, default=720,
                      help='how long to wait in the queue (default: 720)')


def add_job(parser):
  parser.add_argument('--env', action='append', default=[], metavar='NAME=VALUE',
                      help='a variable of the environment of every host')
  parser.add_argument('--secret', action='append', default=[], metavar='NAME=SECRET',
                      help='a variable whose value is in Secret Manager as SECRET; hosts fetch it')
  parser.add_argument('--python', help='an interpreter on the hosts that has all that qwen3_jax '
                      'needs (default: a virtual environment is made)')


def add_limits(parser):
  limits = Limits()
  parser.add_argument('--max-preemptions', type=int, default=limits.preemptions)
  parser.add_argument('--max-failures', type=int, default=limits.failures,
                      help='tries that ended with neither 0 nor 42 (default: 3)')
  parser.add_argument('--max-hours', type=float, default=limits.deadline / 3600,
                      help='of the whole run (default: 720)')
  parser.add_argument('--poll', type=float, default=limits.poll, help='seconds (default: 30)')
  parser.add_argument('--keep', action='store_true', help='do not delete the TPUs in the end')


def main(argv):
  args = make_parser().parse_args(argv)
  try:
    if args.run and not NAME.fullmatch(args.run):
      raise ValueError(f'--run={args.run!r}: want a small letter, then small letters, digits and '
                       '-, at most 40')
    actions = dict(up=up, run=run, status=status, logs=logs, down=down, preflight=preflight,
                   render=render)
    return actions[args.command](args) or 0
  except KeyboardInterrupt:
    say('interrupted')
    return 130
  except Spent as error:
    say(f'error: {error}')
    return 70
  except (ValueError, CloudError) as error:
    say(f'error: {error}')
    return CONFIG if isinstance(error, ValueError) else 1


def place(args):
  return Cloud(args.zone, args.project, args.dry_run)


def request(args):
  piece = shapes.parse(args.tpu)
  known = shapes.GENERATIONS[piece.generation]
  if args.slices < 1:
    raise ValueError(f'--slices={args.slices}: want at least 1')
  if known.runtime is None:
    raise ValueError(f'{piece.generation} has no queued resources here: use `render` and GKE')
  if not piece.named:
    raise ValueError(f'gcloud has no queued resource of {piece.generation} {piece.grid}: take a '
                     'shape that has an accelerator type, or `render` and GKE')
  return Request(args.run, piece, args.slices, getattr(args, 'capacity', 'on-demand'),
                 getattr(args, 'runtime', None) or known.runtime,
                 getattr(args, 'valid_minutes', 720))


def after_dashes(args):
  """The arguments of `python -m qwen3_jax`."""
  given = args.arguments[1:] if args.arguments[:1] == ['--'] else args.arguments
  if not given:
    raise ValueError('nothing to run: give the arguments of python -m qwen3_jax after --')
  return given


def up(args):
  want = request(args)
  nodes = bring_up(place(args), want, Watch(Limits(), Clock()))
  say(f'{len(nodes)} slices are ready; python -m launch down --run={args.run} --zone={args.zone} '
      'deletes them')


def run(args):
  limits = Limits(args.max_hours * 3600, args.max_preemptions, args.max_failures, args.poll)
  return execute(args, after_dashes(args), limits, args.keep)


def preflight(args):
  """The command `preflight` on every host of TPUs that are up."""
  return execute(args, ['preflight'], Limits(failures=0, preemptions=0, deadline=3600, poll=10),
                 keep=True)


def execute(args, arguments, limits, keep):
  want = request(args)
  environment, secrets = (dict(split(each, flag) for each in getattr(args, flag))
                          for flag in ('env', 'secret'))
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch) / args.run
    folder.mkdir()
    code, digest = pack.pack(REPO, folder)
    files = {'code': code, 'host': REPO / 'launch/host.py'}

    def job(nodes, number):
      path = folder / 'job.json'
      path.write_text(json.dumps({
        'arguments': arguments, 'hash': digest, 'try': number, 'environment': environment,
        'secrets': secrets, 'python': args.python,
        'addresses': [address for node in nodes for address in node.addresses]}, indent=1))
      return path
    return supervise(place(args), want, job, files, limits, keep=keep)


def split(text, flag):
  name, equals, value = text.partition('=')
  if not equals or not re.fullmatch('[A-Za-z_][A-Za-z0-9_]*', name):
    raise ValueError(f'--{flag}={text!r}: want NAME=VALUE')
  return name, value


def status(args):
  cloud = place(args)
  name = f'qwen3-{args.run}'
  state = cloud.state(name)
  print(f'{name}: {state or "does not exist"}')
  for node in nodes_of(cloud, name) if state == 'ACTIVE' else ():
    print(f'{node.name}: {node.state}, {len(node.addresses)} hosts')
    print(cloud.ssh(node.name, on_host('status', args.run), check=False).stdout, end='')


def nodes_of(cloud, name):
  """The nodes of a queued resource: one of its name, or NAME-0, NAME-1 ..."""
  if node := cloud.node(name):
    return [node]
  nodes = []
  while node := cloud.node(f'{name}-{len(nodes)}'):
    nodes.append(node)
  return nodes


def logs(args):
  cloud = place(args)
  for node in nodes_of(cloud, f'qwen3-{args.run}'):
    print(cloud.ssh(node.name, f'{on_host("logs", args.run)} {args.lines}',
                    worker=args.host).stdout, end='')


def down(args):
  cloud = place(args)
  if bool(args.run) == args.all:
    raise ValueError('say which: --run=NAME, or --all')
  names = [f'qwen3-{args.run}'] if args.run else cloud.list_names()
  for name in names:
    cloud.delete(name)
    say(f'deleting {name}')


def render(args):
  whole = jobset.render(args.run, args.slices, shapes.parse(args.tpu), args.image,
                        after_dashes(args), args.max_failures)
  print('\n'.join(jobset.to_yaml(whole)))


if __name__ == '__main__':
  signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell had it ignored
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs what cleans up
  sys.exit(main(sys.argv[1:]))
