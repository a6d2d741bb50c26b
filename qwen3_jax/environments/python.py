"""Python in the sandbox as a tool, and questions about numbers that want a program.

Nothing is kept between calls: each runs in a process of its own, with an empty folder.
"""
from qwen3_jax.environments.environment import Environment, tool
from qwen3_jax.rewards import final
from qwen3_jax.rewards.sandbox import Sandbox

CODE, ERROR = 10_000, 1000  # characters of a program; of what it says on stderr
SECONDS, CALLS = 4.0, 2  # of a call; of a turn: so that no turn takes as long as a step may
_ENDS = {'time': 'the program took too long', 'memory': 'the program used too much memory',
         'output': 'the program printed too much', 'killed': 'the program was killed'}


class Python(Environment):
  """Settings: `answer`, the number asked for."""
  tools = (tool(
    'python', 'Runs a Python program and returns what it prints. Every call starts anew: '
    'variables of earlier calls are gone.', ['code'], code={'type': 'string', 'maxLength': CODE}),)

  def __init__(self):
    self.sandbox = Sandbox(seconds=SECONDS)
    self.sandbox.check()  # without a sandbox no episode can begin

  def begin(self, settings):
    self.wanted = settings['answer']

  def call(self, name, arguments):
    result = self.sandbox.run(arguments['code'])
    said = [result.stdout] if result.stdout else []
    if result.status != 'ok':
      why = _ENDS.get(result.status, f'the program ended with code {result.exit_code}')
      said += [result.stderr[-ERROR:], f'Error: {why}']
    return '\n'.join(text.rstrip() for text in said if text) or 'The program printed nothing.'

  def goal(self):
    return {'goal': float(final.agree(self.answer, self.wanted))}


# Questions. Each kind: what is asked of n, a function, and a program that prints the same.

def _count_primes(n):
  sieve = bytearray([1]) * (n + 1)
  sieve[:2] = b'\0\0'[:n + 1]
  for k in range(2, int(n ** 0.5) + 1):
    if sieve[k]:
      sieve[k * k::k] = bytes(len(range(k * k, n + 1, k)))
  return sum(sieve)


def _count_steps(n):
  steps = 0
  while n > 1:
    n, steps = n // 2 if n % 2 == 0 else 3 * n + 1, steps + 1
  return steps


_KINDS = (
  ('the number of primes up to {}', _count_primes,
   'n = {}\nprint(sum(all(k % d for d in range(2, int(k ** 0.5) + 1)) for k in range(2, n + 1)))'),
  ('the sum of the decimal digits of 2 to the power of {}', lambda n: sum(map(int, str(2 ** n))),
   'n = {}\nprint(sum(map(int, str(2 ** n))))'),
  ('the number of steps from {} to 1, if an even number is halved in a step and an odd one '
   'tripled and increased by 1', _count_steps,
   'n, steps = {}, 0\nwhile n > 1:\n  n = n // 2 if n % 2 == 0 else 3 * n + 1\n  steps += 1\n'
   'print(steps)'),
  ('the number of integers from 1 to {} that are divisible by 3 or by 7',
   lambda n: n // 3 + n // 7 - n // 21,
   'n = {}\nprint(sum(k % 3 == 0 or k % 7 == 0 for k in range(1, n + 1)))'),
  ('the number of integers k from 1 to {} whose square leaves 4 when divided by 11',
   lambda n: sum(k * k % 11 == 4 for k in range(1, n + 1)),
   'n = {}\nprint(sum(k * k % 11 == 4 for k in range(1, n + 1)))'),
  ('the number of ones among the binary digits of 3 to the power of {}',
   lambda n: (3 ** n).bit_count(), 'n = {}\nprint(bin(3 ** n).count("1"))'))
_LARGEST = {1: 100, 2: 3000, 3: 1000, 4: 8000, 5: 8000}


def make(rng, difficulty):
  """(question, settings, plan): one to three numbers, each asked of the one before."""
  kinds = rng.sample(_KINDS, (difficulty + 1) // 2)
  value, plan, lets = rng.randint(20, _LARGEST[difficulty]), [], []
  said = str(value)
  for (words, compute, code), name in zip(kinds, 'abc'):
    lets.append(f'Let {name} be {words.format(said)}.')
    plan.append((f'I compute {words.format(value)}.',
                 [{'name': 'python', 'arguments': {'code': code.format(value)}}]))
    value, asked, said = compute(value), words.format(said), name
  plan.append((f'The program says {value}.', f'The answer is {value}.'))
  question = ' '.join([*lets[:-1], f'What is {asked}? Use Python.'])
  return question, {'answer': str(value), 'turns': len(plan) + 3, 'calls': CALLS}, plan
